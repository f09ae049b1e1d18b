package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/load"
)

// event is something that is counted.
type event string

const (
	eventVolume       event = "volumes"
	eventAttach       event = "attaches"
	eventDetach       event = "detaches"
	eventVerify       event = "whole volumes verified"
	eventKillServer   event = "kills of a server"
	eventHang         event = "hangs of a server"
	eventKillSuper    event = "kills of the supervisor"
	eventKillDriver   event = "kills of the driver"
	eventKillAll      event = "kills of all together"
	eventUpgrade      event = "servers upgraded"
	eventStall        event = "stalls of the store"
	eventGrow         event = "resizes"
	eventSnapshot     event = "snapshots of volumes in use"
	eventRestore      event = "snapshots restored and verified"
	eventNoSnapshot   event = "snapshots that the format can't do"
	eventNoGrow       event = "resizes that the format can't do"
	eventDropSnapshot event = "snapshots deleted"
	eventError        event = "errors"
)

// order is that of the table.
var order = []event{
	eventVolume, eventAttach, eventDetach, eventKillServer, eventHang, eventKillSuper, eventKillDriver, eventKillAll,
	eventUpgrade, eventStall, eventGrow, eventNoGrow, eventSnapshot, eventNoSnapshot, eventRestore, eventDropSnapshot, eventVerify, eventError,
}

// tally is what has happened. It is safe for concurrent use.
type tally struct {
	mu     sync.Mutex
	events map[event]int
	loads  map[kind]load.Counts // of volumes that ended
	lives  map[kind]int
	pause  time.Duration // the longest that requests waited for an upgrade
}

func newTally() *tally {
	return &tally{events: map[event]int{}, loads: map[kind]load.Counts{}, lives: map[kind]int{}}
}

func (t *tally) add(e event) { t.addN(e, 1) }

func (t *tally) addN(e event, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events[e] += n
}

// addLoad adds what was done to a volume.
func (t *tally) addLoad(k kind, c load.Counts) {
	t.mu.Lock()
	defer t.mu.Unlock()
	sum := t.loads[k]
	sum.Requests += c.Requests
	sum.WrittenBytes += c.WrittenBytes
	sum.ReadBytes += c.ReadBytes
	sum.Longest = max(sum.Longest, c.Longest)
	t.loads[k] = sum
	t.lives[k]++
}

func (t *tally) addPause(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pause = max(t.pause, d)
}

func (t *tally) errors() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.events[eventError]
}

// String is one line.
func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var parts []string
	for _, e := range order {
		if n := t.events[e]; n > 0 || e == eventError {
			parts = append(parts, fmt.Sprintf("%d %s", n, e))
		}
	}
	return strings.Join(parts, ", ")
}

// print prints tables of everything.
func (t *tally) print(out io.Writer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, e := range order {
		if n := t.events[e]; n > 0 || e == eventError {
			fmt.Fprintf(w, "%s\t%d\n", e, n)
		}
	}
	_ = w.Flush()
	fmt.Fprintf(out, "\nlongest pause of a planned upgrade: %v\n\n", t.pause.Round(time.Millisecond))
	fmt.Fprintln(w, "FORMAT\tTRANSPORT\tVOLUMES\tREQUESTS\tMIB WRITTEN\tMIB READ AND COMPARED\tLONGEST REQUEST")
	for _, k := range slices.SortedFunc(maps.Keys(t.loads), func(a, b kind) int {
		return strings.Compare(a.transport+" "+a.format, b.transport+" "+b.format)
	}) {
		c := t.loads[k]
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%v\n", k.format, k.transport, t.lives[k], c.Requests,
			c.WrittenBytes>>20, c.ReadBytes>>20, c.Longest.Round(time.Millisecond))
	}
	_ = w.Flush()
}
