package store_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// counter writes a number to two places, one after the other, over and over: at every
// moment the first is the second, or one ahead. Places of different counters lie in one
// cluster of the image, so that overlays have to merge them.
type counter struct {
	device    block.Device
	off       int64
	completed atomic.Uint64 // both places hold at least this
}

const counterGap = 3 * mib // between the places

func (c *counter) run(stop <-chan struct{}) error {
	p := make([]byte, 512)
	for n := c.completed.Load() + 1; ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		binary.LittleEndian.PutUint64(p, n)
		for _, off := range []int64{c.off, c.off + counterGap} {
			if _, err := c.device.WriteAt(p, off); err != nil {
				return fmt.Errorf("write %d at %d: %w", n, off, err)
			}
		}
		c.completed.Store(n)
	}
}

// read returns what the two places hold.
func readCounter(tb testing.TB, d block.Device, off int64) (first, second uint64) {
	tb.Helper()
	p := make([]byte, 8)
	_, err := d.ReadAt(p, off)
	must(tb, err)
	first = binary.LittleEndian.Uint64(p)
	_, err = d.ReadAt(p, off+counterGap)
	must(tb, err)
	return first, binary.LittleEndian.Uint64(p)
}

// A snapshot of a volume under load holds everything that had completed when it was asked
// for, and is a state that the volume was in: no later write without an earlier one.
func TestCreateSnapshot_UnderLoad(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		volume(t, s, "v")
		a := attach(t, s, "v", "n1")
		stop := make(chan struct{})
		var writers sync.WaitGroup
		counters := make([]*counter, 4)
		for i := range counters {
			counters[i] = &counter{device: a, off: int64(i) * 1024}
			writers.Go(func() {
				if err := counters[i].run(stop); err != nil {
					t.Error(err)
				}
			})
		}
		writers.Go(func() { flushUntil(t, a, stop) })
		const snapshots = 5
		var lowest, highest [snapshots][]uint64
		for n := range snapshots {
			for _, c := range counters {
				lowest[n] = append(lowest[n], c.completed.Load())
			}
			_, err := s.CreateSnapshot(t.Context(), "v", fmt.Sprintf("s%d", n))
			must(t, err)
			for _, c := range counters {
				highest[n] = append(highest[n], c.completed.Load()+1)
			}
		}
		close(stop)
		writers.Wait()
		for n := range snapshots {
			withVolume(t, s, "v", store.AttachOptions{Snapshot: fmt.Sprintf("s%d", n), ReadOnly: true}, func(d block.Device) {
				for i, c := range counters {
					first, second := readCounter(t, d, c.off)
					if first != second && first != second+1 {
						t.Errorf("snapshot %d, counter %d: %d and %d are no state the volume was in", n, i, first, second)
					}
					if second < lowest[n][i] || first > highest[n][i] {
						t.Errorf("snapshot %d, counter %d: %d and %d, want from %d to %d", n, i, first, second, lowest[n][i], highest[n][i])
					}
				}
			})
		}
		for i, c := range counters {
			if first, second := readCounter(t, a, c.off); first != second || first != c.completed.Load() {
				t.Errorf("counter %d: the volume holds %d and %d, want %d", i, first, second, c.completed.Load())
			}
		}
		detach(t, s, a)
		expectClean(t, s)
	})
}

func flushUntil(t *testing.T, d block.Device, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(2 * time.Millisecond):
			if err := d.Flush(); err != nil {
				t.Error(err)
			}
		}
	}
}

// A server killed, or a node that lost power, at any change of the store while snapshots
// and an expansion are carried out live under load: what was flushed is there, snapshots
// that were reported hold what they held, and the wishes are carried out in the end.
func TestAttach_InterruptedLive(t *testing.T) {
	r := testenv.Rand(t)
	m := vfs.NewMem()
	setup := openStore(t, m)
	volume(t, setup, "v")

	type left struct {
		fs               *vfs.Mem
		flushed, written byte // generations
		snapshots        int  // reported
	}
	var mu sync.Mutex
	var lefts []left
	var now left
	armed := false
	s := openStore(t, vfs.Inject(m, vfs.If(vfs.Changing, func(vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if armed {
			l := now
			l.fs = m.Crash(r)
			lefts = append(lefts, l)
		}
		return nil
	})))
	note := func(change func(*left)) {
		mu.Lock()
		defer mu.Unlock()
		change(&now)
	}
	a := attach(t, s, "v", "n1")
	armed = true
	for n := range 3 {
		generation := byte(n + 1)
		note(func(l *left) { l.written = generation })
		writeStamp(t, a, 0, generation)
		writeStamp(t, a, int64(n)*mib, generation)
		if n != 1 { // once without, so that the snapshot has to make it durable
			must(t, a.Flush())
			note(func(l *left) { l.flushed = generation })
		}
		_, err := s.CreateSnapshot(t.Context(), "v", fmt.Sprintf("s%d", generation))
		must(t, err)
		note(func(l *left) { l.snapshots, l.flushed = n+1, generation })
	}
	_, err := s.Expand(t.Context(), "v", 32*mib, 0)
	must(t, err)
	armed = false
	must(t, a.Close())

	for i, l := range lefts {
		s := openStore(t, l.fs)
		must(t, s.Unpublish(t.Context(), "v", ""))
		b := attach(t, s, "v", "n2")
		got := generationAt(t, b, 0)
		if got < l.flushed || got > l.written {
			t.Errorf("point %d: generation %d, want from %d to %d", i, got, l.flushed, l.written)
		}
		writeStamp(t, b, 0, 100)
		for n := range l.snapshots {
			generation := byte(n + 1)
			withVolume(t, s, "v", store.AttachOptions{Snapshot: fmt.Sprintf("s%d", generation), ReadOnly: true}, func(d block.Device) {
				expectStamp(t, d, 0, generation)
			})
		}
		// Wishes that were under way are finished by the new holder.
		waitFor(t, func() bool {
			snapshots, err := s.Snapshots(t.Context())
			must(t, err)
			for _, snap := range snapshots {
				if !snap.Ready {
					return false
				}
			}
			rec, err := s.Volume(t.Context(), "v")
			must(t, err)
			return rec.WantSizeBytes <= rec.SizeBytes
		})
		expectStamp(t, b, 0, 100)
		must(t, b.Close())
		expectSound(t, s, fmt.Sprintf("point %d", i))
		deleteAll(t, s, l.fs, fmt.Sprintf("point %d", i))
	}
	t.Logf("%d points", len(lefts))
}

// generationAt returns the generation of the stamp at off, 0 for zeroes.
func generationAt(tb testing.TB, d block.Device, off int64) byte {
	tb.Helper()
	p := make([]byte, 512)
	_, err := d.ReadAt(p, off)
	must(tb, err)
	expectStamp(tb, d, off, p[511])
	return p[511]
}

func waitFor(tb testing.TB, done func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(testWait); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatal("it does not happen")
		}
	}
}

// A server whose process is killed comes back with everything that had completed (P1),
// even in the middle of a snapshot; nobody else takes a snapshot in between, which would
// lack what is only in the journal.
func TestAttach_JournalAfterKill(t *testing.T) {
	s, m := newStore(t)
	volume(t, s, "v")
	epoch, err := s.Publish(t.Context(), store.PublishRequest{Volume: "v", Node: "n1"})
	must(t, err)
	journal := filepath.Join(t.TempDir(), "journal")
	a, err := s.Attach(t.Context(), "v", store.AttachOptions{Node: "n1", Epoch: epoch, Journal: journal})
	must(t, err)
	for off := int64(0); off < 8*mib; off += mib {
		writeStamp(t, a, off, 1)
	}
	left := m.Clone() // killed: a goes on, in a world of its own
	restarted := openStore(t, left)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if snap, err := restarted.CreateSnapshot(ctx, "v", "s"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a snapshot without the server that has the journal: %+v, %v", snap, err)
	}
	b, err := restarted.Attach(t.Context(), "v", store.AttachOptions{Node: "n1", Epoch: epoch, Journal: journal})
	must(t, err)
	_, err = restarted.CreateSnapshot(t.Context(), "v", "s")
	must(t, err)
	for _, d := range []block.Device{b, openSnapshot(t, restarted, "v", "s")} {
		for off := int64(0); off < 8*mib; off += mib {
			expectStamp(t, d, off, 1)
		}
		must(t, d.Close())
	}
	expectSound(t, restarted, "restarted")
	must(t, a.Close())
}

func openSnapshot(tb testing.TB, s *store.Store, volume, snapshot string) block.Device {
	tb.Helper()
	a, err := s.Attach(tb.Context(), volume, store.AttachOptions{Snapshot: snapshot, ReadOnly: true})
	must(tb, err)
	return a
}

// A holder that has not seen that the volume is another's does not tidy the image when it
// closes: the other may have made it longer meanwhile.
func TestAttach_FencedBeforeClose(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m)
	opts := fast
	opts.PollInterval = time.Hour
	old, err := store.Open(t.Context(), "old", m, opts)
	must(t, err)
	volume(t, s, "v")
	a := attach(t, old, "v", "n1")
	writeStamp(t, a, 0, 1)
	must(t, a.Flush())
	file := a.Record().Layers[0].File
	f, err := m.Open(file, vfs.ReadOnly)
	must(t, err)
	before, err := f.Size()
	must(t, err)
	must(t, s.Unpublish(t.Context(), "v", "n1"))
	if err := a.Close(); !errors.Is(err, block.ErrFenced) {
		t.Errorf("close: %v", err)
	}
	after, err := f.Size()
	must(t, err)
	if before != after {
		t.Errorf("%s had %d bytes, and %d after a holder closed it that had lost it", file, before, after)
	}
	must(t, f.Close())
	expectSound(t, s, "closed")
}

// A node that lost the volume stops at once, and the next one gets it without waiting for
// anything else.
func TestAttach_Fencing(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		volume(t, s, "v")
		a := attach(t, s, "v", "n1")
		writeStamp(t, a, 0, 1)
		must(t, a.Flush())
		writeStamp(t, a, mib, 1) // will be lost, like anything not flushed
		must(t, s.Unpublish(t.Context(), "v", "n1"))
		closed := make(chan struct{})
		go func() { // as the server does
			defer close(closed)
			err := <-a.Lost()
			if !errors.Is(err, block.ErrFenced) {
				t.Errorf("lost: %v", err)
			}
			if _, err := a.WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrFenced) {
				t.Errorf("write after the fence: %v", err)
			}
			if err := a.Flush(); !errors.Is(err, block.ErrFenced) {
				t.Errorf("flush after the fence: %v", err)
			}
			if err := a.Close(); !errors.Is(err, block.ErrFenced) {
				t.Errorf("close after the fence: %v", err)
			}
		}()
		b := attach(t, s, "v", "n2")
		<-closed
		expectStamp(t, b, 0, 1)
		writeStamp(t, b, 0, 2)
		if _, err := s.Attach(t.Context(), "v", store.AttachOptions{Node: "n1", Epoch: 1}); !errors.Is(err, block.ErrFenced) {
			t.Errorf("attach with an old epoch: %v", err)
		}
		detach(t, s, b)
		withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) { expectStamp(t, d, 0, 2) })
		expectSound(t, s, "fenced")
	})
}

// Published again to the same node is another publication: the old server is fenced.
func TestAttach_SameNodeAgain(t *testing.T) {
	s, _ := newStore(t)
	volume(t, s, "v")
	a := attach(t, s, "v", "n1")
	must(t, s.Unpublish(t.Context(), "v", "n1"))
	go func() {
		<-a.Lost()
		_ = a.Close()
	}()
	b := attach(t, s, "v", "n1")
	detach(t, s, b)
}

func TestAttach_Refused(t *testing.T) {
	s, _ := newStore(t)
	volume(t, s, "v")
	ctx := t.Context()
	attachErr := func(name string, opts store.AttachOptions) error {
		a, err := s.Attach(ctx, name, opts)
		if err == nil {
			must(t, a.Close())
		}
		return err
	}
	for _, c := range []struct {
		name string
		opts store.AttachOptions
		want error
	}{
		{"missing", store.AttachOptions{}, block.ErrNotFound},
		{"../v", store.AttachOptions{}, block.ErrInvalid},
		{"v", store.AttachOptions{Node: "n1", Epoch: 1}, block.ErrFenced},
		{"v", store.AttachOptions{Snapshot: "s"}, block.ErrReadOnly},
		{"v", store.AttachOptions{Snapshot: "s", ReadOnly: true}, block.ErrNotFound},
		{"v", store.AttachOptions{Journal: "/tmp/j"}, block.ErrInvalid},
		{"v", store.AttachOptions{Node: "n1", Journal: "j"}, block.ErrInvalid},
	} {
		if err := attachErr(c.name, c.opts); !errors.Is(err, c.want) {
			t.Errorf("attach %s %+v: %v, want %v", c.name, c.opts, err, c.want)
		}
	}
	epoch, err := s.Publish(ctx, store.PublishRequest{Volume: "v", Node: "n1", ReadOnly: true})
	must(t, err)
	if err := attachErr("v", store.AttachOptions{Node: "n1", Epoch: epoch}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write what is published for reading: %v", err)
	}
	if err := attachErr("v", store.AttachOptions{}); !errors.Is(err, block.ErrBusy) {
		t.Errorf("local use of a published volume: %v", err)
	}
}

// Several nodes read one volume, and a snapshot can be taken of it all the same.
func TestAttach_SharedReaders(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		written(t, s, "v")
		var readers []*store.Attached
		for _, node := range []string{"n1", "n2", "n3"} {
			epoch, err := s.Publish(t.Context(), store.PublishRequest{Volume: "v", Node: node, ReadOnly: true, Shared: true})
			must(t, err)
			a, err := s.Attach(t.Context(), "v", store.AttachOptions{Node: node, Epoch: epoch, ReadOnly: true})
			must(t, err)
			readers = append(readers, a)
		}
		_, err := s.Expand(t.Context(), "v", 16*mib, 0)
		expectError(t, "expand what is being read", err, block.ErrBusy, "n1, n2, n3")
		_, err = s.CreateSnapshot(t.Context(), "v", "s")
		must(t, err)
		for _, a := range readers {
			expectStamp(t, a, 0, 1)
			if _, err := a.WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("write by a reader: %v", err)
			}
			must(t, a.Close())
		}
		must(t, s.Unpublish(t.Context(), "v", ""))
		expectGeneration(t, s, "v", "s", 1)
		expectClean(t, s)
	})
}

// Between the record that names the new top and the switch to it, a kill must lose nothing
// that had completed, although the journal is for the old top: everything is in the store
// by then, and requests stand still.
func TestCreateSnapshot_KilledBetweenRecordAndSwitch(t *testing.T) {
	// The first write gives the image a new identity, also after the overlay was made.
	t.Run("Written", func(t *testing.T) { killBetweenRecordAndSwitch(t, true) })
	t.Run("NotWritten", func(t *testing.T) { killBetweenRecordAndSwitch(t, false) })
}

func killBetweenRecordAndSwitch(t *testing.T, written bool) {
	m := vfs.NewMem()
	volume(t, openStore(t, m), "v")
	journalDir, journalLeft := t.TempDir(), t.TempDir()
	var left *vfs.Mem
	var a *store.Attached
	var state atomic.Int32 // 1: armed, 2: wrote after the first flush, 3: recorded
	early := make(chan bool, 1)
	wrote := make(chan struct{})
	s := openStore(t, vfs.Inject(m, func(op vfs.Op) error {
		switch {
		case state.Load() == 1 && op.Kind == vfs.OpOpen && op.Name == "volumes/v/volume.lock" && exists(m, "volumes/v/v-000001.qcow2"):
			state.Store(2)
			writeStamp(t, a, 3*mib, 2)
		case state.Load() == 2 && op.Kind == vfs.OpSyncDir && strings.Contains(contents(t, m, "volumes/v/volume.json"), `"layer": "volumes/v/v.qcow2"`):
			state.Store(3)
			early <- returnsSoon(func() {
				defer close(wrote)
				writeStamp(t, a, 5*mib, 2)
			})
			left = m.Clone()
			must(t, os.CopyFS(journalLeft, os.DirFS(journalDir)))
		}
		return nil
	}))
	epoch, err := s.Publish(t.Context(), store.PublishRequest{Volume: "v", Node: "n"})
	must(t, err)
	a, err = s.Attach(t.Context(), "v", store.AttachOptions{Node: "n", Epoch: epoch, Journal: filepath.Join(journalDir, "j")})
	must(t, err)
	if written {
		writeStamp(t, a, mib, 1)
	}
	state.Store(1)
	must(t, ignoreSnapshot(openStore(t, m).CreateSnapshot(t.Context(), "v", "s")))
	if state.Load() != 3 {
		t.Fatal("the switch was not seen")
	}
	<-wrote
	must(t, a.Close())
	if <-early {
		t.Error("a write completed while the record and the device named different tops")
	}

	restarted := openStore(t, left)
	b, err := restarted.Attach(t.Context(), "v", store.AttachOptions{Node: "n", Epoch: epoch, Journal: filepath.Join(journalLeft, "j")})
	must(t, err)
	if snap := b.Record().Snapshots[0]; !snap.Ready || len(b.Record().Layers) != 2 {
		t.Errorf("the switch is not finished: %+v", b.Record())
	}
	if written {
		expectStamp(t, b, mib, 1)
	}
	expectStamp(t, b, 3*mib, 2)
	must(t, b.Close())
	withVolume(t, restarted, "v", store.AttachOptions{Snapshot: "s", ReadOnly: true}, func(d block.Device) { expectStamp(t, d, 3*mib, 2) })
	expectSound(t, restarted, "restarted")
}

// returnsSoon reports whether f, which runs on, returns at once.
func returnsSoon(f func()) bool {
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		f()
	}()
	select {
	case <-returned:
		return true
	case <-time.After(50 * time.Millisecond):
		return false
	}
}

func exists(m *vfs.Mem, name string) bool {
	_, err := m.Stat(name)
	return err == nil
}
