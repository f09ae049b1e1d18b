package formattest

import (
	"fmt"
	"path"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// Factory describes one kind of image of a format: the suite runs once for each.
type Factory struct {
	// Name is the name of the subtest: "sparse", "flat".
	Name string
	// Format is under test.
	Format formats.Format
	// Create is what images are created with. The suite sets FS, Name, SizeBytes and
	// Parent.
	Create formats.CreateRequest
	// Overlay is what images that stand on one of this kind, or on another overlay, are
	// created with; nil: there are none.
	Overlay *formats.CreateRequest
	// FileName is the main file's name; "" means "disk." and the format's name.
	FileName string
	// SizeBytes is the guest size; 0 means 20 clusters and a bit. The suite holds many
	// copies of the whole disk in memory and reads it some ten thousand times: small
	// clusters make it quick.
	SizeBytes int64
	// QEMU is what qemu-img calls the format; "" if it cannot read such images.
	QEMU string
	// Headerless says that the file's length is all there is to tell the size, so that a
	// crash while an image is created or grown leaves it anywhere on its way.
	Headerless bool
	// CannotGrow says that Resize to a larger size is refused.
	CannotGrow bool
	// CanShrink says that Shrink works; otherwise it is refused. On a parent it may be
	// refused in any case.
	CanShrink bool
	// GranuleBytes is the least that can be present alone, where that is less than a
	// cluster: a subcluster, a sector of a block with a bitmap. 0: a cluster.
	GranuleBytes int64
	// Compressed says that the image can hold compressed granules (engine.Compressor):
	// scripts write such, too.
	Compressed bool
	// FilledOnly says that images get their contents once, from formats.Convert, and can
	// only be read from then on (streamOptimized VMDK). Of the suite only what applies to
	// such images runs.
	FilledOnly bool
	// CanRebase says that what an overlay stands on can be changed (SetParent).
	CanRebase bool
	// Secret knows the password of images that are encrypted; nil: they are not. The suite
	// hands it to everything that creates or opens one.
	Secret formats.Secret
	// QEMUCrypt is what qemu-img calls the encryption (encrypt.format): "aes".
	QEMUCrypt string
	// Base, if set, is what every chain stands on: an image of another format, or of
	// another size. Then the images of the kind under test are all made by Overlay, and
	// Create is not used.
	Base *Base
	// Cost is how many times longer a step takes than with small clusters: the suite does
	// so many times fewer. 0 means 1. (VHDX, whose blocks have at least 1 MiB.)
	Cost int
	// RepairsLeaks says that a repair gives back all space that nothing refers to, and a
	// check finds none then. Formats without a map of free space may not be able to.
	RepairsLeaks bool
	// Reseal, if set, puts right the checksums in a file of an image, as far as they can be
	// found: damage is to be found by what it does, too, not by checksums alone.
	Reseal func(name string, file []byte)
	// BeforeOracle, if set, makes a copy of an image that a crash left fit for qemu-img
	// to look at without repair, or returns an error. See ReplayLog.
	BeforeOracle func(qemuImg, file string) error
}

// Base is what overlays of a kind under test stand on.
type Base struct {
	// Format is the base's. Registered if need be.
	Format formats.Format
	// Create is what it is created with. The suite sets FS, Name and SizeBytes.
	Create formats.CreateRequest
	// SizeBytes is its guest size; 0: the overlay's. What lies past a smaller one reads
	// as zeroes.
	SizeBytes int64
	// FileName is the main file's name; "" means "base." and the format's name.
	FileName string
	// QEMU is what qemu-img calls the format; "" if it cannot read such images.
	QEMU string
	// Unnamed says that an overlay's file does not say of which format its parent is
	// (QCOW version 1): then it has to be given when the chain is opened.
	Unnamed bool
}

func (b *Base) fileName() string {
	if b.FileName != "" {
		return b.FileName
	}
	return "base." + b.Format.Name()
}

// Run tests images of the factories' kinds.
func Run(t *testing.T, factories ...Factory) {
	// Whole disks come and go thousands of times: collecting them less often halves the
	// time it takes.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	defer WriteFigures(t)
	for _, f := range factories {
		f.register()
		t.Run(f.Name, func(t *testing.T) {
			for _, part := range parts {
				if f.FilledOnly && !part.filled {
					continue
				}
				t.Run(part.name, func(t *testing.T) {
					f.noteFailure(t)
					checkGoroutines(t)
					part.test(t, f)
				})
			}
		})
	}
}

// parts are the subtests, the quickest to tell what is wrong first.
var parts = []struct {
	name   string
	filled bool // it is for images that can only be filled, too
	test   func(*testing.T, Factory)
}{
	{"Model", false, testModel},
	{"Convert", true, testConvert},
	{"Concurrent", false, testConcurrent},
	{"Bounds", false, testBounds},
	{"Grow", false, testGrow},
	{"Shrink", false, testShrink},
	{"Rebase", false, testRebase},
	{"Reuse", false, testReuse},
	{"Locks", false, testLocks},
	{"Secret", false, testSecret},
	{"Repair", false, testRepair},
	{"Memory", false, testMemory},
	{"FullStore", false, testFullStore},
	{"Hostile", true, testHostile},
	{"CrashSweep", false, testCrashSweep},
	{"KillSweep", false, testKillSweep},
	{"ErrorSweep", false, testErrorSweep},
}

// register makes the format known, so that formats.Open finds it.
func (f Factory) register() {
	if _, err := formats.Lookup(f.Format.Name()); err != nil {
		formats.Register(f.Format)
	}
	if f.Base == nil {
		return
	}
	if _, err := formats.Lookup(f.Base.Format.Name()); err != nil {
		formats.Register(f.Base.Format)
	}
}

// onLarger reports whether the disks stand on a larger one.
func (f Factory) onLarger() bool { return f.Base != nil && f.Base.SizeBytes > f.shape().size }

// scaled returns how many of something a test does: n, fewer in short mode and where
// everything takes long.
func (f Factory) scaled(n int) int {
	if testing.Short() {
		n /= 5
	}
	return max(n/max(f.Cost, 1), 1)
}

// fileName returns the name of a layer's main file, 0 being the bottom of a chain.
func (f Factory) fileName(layer int) string {
	name := f.FileName
	if name == "" {
		name = "disk." + f.Format.Name()
	}
	if layer == 0 {
		return name
	}
	ext := path.Ext(name)
	return fmt.Sprintf("%s-%06d%s", name[:len(name)-len(ext)], layer, ext)
}

// shape returns the form of the disks that are tested.
func (f Factory) shape() shape {
	options := f.Format.Options()
	create := f.Create
	if f.Base != nil {
		create = *f.Overlay
	}
	s := shape{quantum: max(options.SizeMultiple, 1), cluster: create.ClusterBytes, granule: f.GranuleBytes, size: f.SizeBytes}
	if s.cluster == 0 {
		s.cluster = options.DefaultClusterBytes
	}
	if s.cluster == 0 {
		s.cluster = 8 << 10 // anything: it gives the requests their sizes
	}
	if s.size == 0 {
		s.size = 20*s.cluster + 5*512 // not a multiple of a cluster
		s.size = (s.size + s.quantum - 1) / s.quantum * s.quantum
	}
	if s.granule == 0 {
		s.granule = s.cluster
	}
	s.maxGrow = s.size + 8*s.cluster
	return s
}

// checkGoroutines fails the test if it leaves goroutines behind.
func checkGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for range 200 {
			if runtime.NumGoroutine() <= before {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		stacks := make([]byte, 64<<10)
		stacks = stacks[:runtime.Stack(stacks, true)]
		t.Errorf("%d goroutines, %d before the test:\n%s", runtime.NumGoroutine(), before, stacks)
	})
}
