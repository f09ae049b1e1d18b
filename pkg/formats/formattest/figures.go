package formattest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

// Kind is what figures are counted for: a format, and its subformat, "" if it has none.
type Kind struct{ Format, Subformat string }

// Figures is what the suite has done with images of one kind in this process.
type Figures struct {
	Created        atomic.Int64 // images made
	Operations     atomic.Int64 // steps of scripts played
	Discards       atomic.Int64 // of them, discards
	Resizes        atomic.Int64 // times that a disk grew or shrank
	CrashPoints    atomic.Int64 // operations at which power was lost
	Crashes        atomic.Int64 // images looked at: several for each point
	Kills          atomic.Int64 // points at which the process was killed, in memory
	ProcessKills   atomic.Int64 // real processes killed
	InjectedErrors atomic.Int64 // file system operations that were made to fail
	HostileImages  atomic.Int64 // damaged images used
	Repairs        atomic.Int64 // images repaired after crashes
	FuzzInputs     atomic.Int64 // inputs of fuzz targets that were played
	OracleChecks   atomic.Int64 // images that qemu-img found sound
	OracleCompares atomic.Int64 // chains that qemu-img read the same from
	OracleCrashes  atomic.Int64 // images after crashes that qemu-img looked at
	ReadTheirs     atomic.Int64 // images made by others that we read the same from
	ReadByOthers   atomic.Int64 // times that another program read the same from an image of ours
	Served         atomic.Int64 // operations verified through csi-imgdisk serve
}

// Report is what WriteFigures writes of one kind.
type Report struct {
	Kind
	Counts map[string]int64 // by the names in Figures
	Failed []string         // tests
}

var figures = struct {
	sync.Mutex
	of     map[Kind]*Figures
	failed map[Kind][]string
}{of: map[Kind]*Figures{}, failed: map[Kind][]string{}}

// FiguresOf returns the figures of a kind, to be added to.
func FiguresOf(k Kind) *Figures {
	figures.Lock()
	defer figures.Unlock()
	if figures.of[k] == nil {
		figures.of[k] = &Figures{}
	}
	return figures.of[k]
}

// kind returns the kind of the factory's images that are depth-1 of it above the lowest.
func (f Factory) kind(depth int) Kind {
	options := f.Format.Options()
	create, usual := f.Create, options.Subformats
	if depth > 1 && f.Overlay != nil || f.Base != nil {
		create, usual = *f.Overlay, options.OverlaySubformats
	}
	k := Kind{Format: f.Format.Name(), Subformat: create.Subformat}
	if len(usual) > 0 {
		k.Subformat = cmp.Or(k.Subformat, usual[0])
	}
	return k
}

func (f Factory) figures(depth int) *Figures { return FiguresOf(f.kind(depth)) }

// figures returns those of the rig's top image.
func (r *rig) figures() *Figures { return r.f.figures(len(r.names)) }

// counted logs how much a test added to a figure of the factory's images.
func (f Factory) counted(t testing.TB, what string, figure func(*Figures) *atomic.Int64) {
	t.Helper()
	sum := func() int64 {
		n := figure(f.figures(1)).Load()
		if f.kind(2) != f.kind(1) {
			n += figure(f.figures(2)).Load()
		}
		return n
	}
	before := sum()
	t.Cleanup(func() { t.Logf("%d %s", sum()-before, what) })
}

// noteFailure notes with the figures that a test has failed, if it has when it ends.
func (f Factory) noteFailure(t *testing.T) {
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		figures.Lock()
		defer figures.Unlock()
		k := f.kind(1)
		figures.failed[k] = append(figures.failed[k], t.Name())
	})
}

// figuresVariable names the directory that WriteFigures writes to.
const figuresVariable = "IMGDISK_FIGURES"

// WriteFigures writes what was counted to a new file in the directory that IMGDISK_FIGURES
// names, as a list of Reports, and begins anew. Without the variable it does nothing. Run,
// KillProcess and Fuzz call it at their end.
func WriteFigures(t testing.TB) {
	dir := os.Getenv(figuresVariable)
	if dir == "" {
		return
	}
	figures.Lock()
	defer figures.Unlock()
	var reports []Report
	for k, counts := range figures.of {
		reports = append(reports, Report{Kind: k, Counts: counts.counts(), Failed: figures.failed[k]})
	}
	clear(figures.of)
	clear(figures.failed)
	b, err := json.Marshal(reports)
	if err == nil {
		err = writeNew(filepath.Join(dir, fmt.Sprintf("figures-%d-*.json", os.Getpid())), b)
	}
	if err != nil {
		t.Errorf("write figures: %v", err)
	}
}

func writeNew(pattern string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(pattern), filepath.Base(pattern))
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

func (f *Figures) counts() map[string]int64 {
	counts := map[string]int64{}
	for name, figure := range map[string]*atomic.Int64{
		"Created": &f.Created, "Operations": &f.Operations, "Discards": &f.Discards, "Resizes": &f.Resizes,
		"CrashPoints": &f.CrashPoints, "Crashes": &f.Crashes, "Kills": &f.Kills, "ProcessKills": &f.ProcessKills,
		"InjectedErrors": &f.InjectedErrors, "HostileImages": &f.HostileImages, "Repairs": &f.Repairs,
		"FuzzInputs": &f.FuzzInputs, "OracleChecks": &f.OracleChecks, "OracleCompares": &f.OracleCompares,
		"OracleCrashes": &f.OracleCrashes, "ReadTheirs": &f.ReadTheirs, "ReadByOthers": &f.ReadByOthers,
		"Served": &f.Served,
	} {
		if n := figure.Load(); n > 0 {
			counts[name] = n
		}
	}
	return counts
}
