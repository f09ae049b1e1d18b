package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Where things lie in newSESparse's extent, and what its grains hold: 0 and 1 data, 2
// zeroes, 3 unmapped, 5 data again; of the second table there is nothing.
const (
	seSize      = 20 << 20
	seVolatile  = 512
	seDirectory = 4096
	seTables    = 8192
	seGrains    = 128 * 512
	seGrain     = 4096
)

// newSESparse returns an seSparse image in a.vmdk, whose extent is e.vmdk.
func newSESparse(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	p := make([]byte, seGrains+3*seGrain)
	put := func(off int, values ...uint64) {
		for i, v := range values {
			binary.LittleEndian.PutUint64(p[off+8*i:], v)
		}
	}
	put(0, 0xcafebabe, 0x200000001, seSize/512, 8, 64, 0, 0, 0, 0, 0, seVolatile/512, 1, 2, 1, 3, 1,
		seDirectory/512, 1, seTables/512, 112, 4, 1, 5, 1, seGrains/512, seSize/512)
	put(seVolatile, 0xcafecafe, 1, 7, 0)
	put(seDirectory, 0x1000000000000000)
	put(seTables, 0x3002000000000000, 0x3000000000000000, 0x2000000000000000, 0x1000000000000000, 0, 0x3001000000000000)
	for i, c := range []byte("bca") {
		copy(p[seGrains+i*seGrain:], bytes.Repeat([]byte{c}, seGrain))
	}
	addFile(t, fsys, "e.vmdk", p)
	addFile(t, fsys, "a.vmdk", []byte(header("seSparse")+"RW 40960 SESPARSE \"e.vmdk\"\n"))
	return fsys
}

func seContents() []byte {
	p := make([]byte, seSize)
	for i, c := range map[int]byte{0: 'a', 1: 'b', 5: 'c'} {
		copy(p[i*seGrain:], bytes.Repeat([]byte{c}, seGrain))
	}
	return p
}

func TestSESparse(t *testing.T) {
	fsys := newSESparse(t)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), seContents()) {
		t.Error("it reads as something else")
	}
	checkClean(t, image)
	if _, err := image.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write: error %v, want %v", err, block.ErrReadOnly)
	}
	for off, want := range map[int64]block.Extent{
		100:             {Len: seGrain - 100, State: block.Data},
		seGrain:         {Len: seGrain, State: block.Data},
		2*seGrain + 1:   {Len: 2*seGrain - 1, State: block.Zero},
		4 * seGrain:     {Len: seGrain, State: block.Unallocated},
		6 * seGrain:     {Len: seSize - 6*seGrain, State: block.Unallocated},
		18 << 20:        {Len: 2 << 20, State: block.Unallocated},
		seSize - 3:      {Len: 3, State: block.Unallocated},
		5*seGrain + 500: {Len: seGrain - 500, State: block.Data},
	} {
		if e, err := image.Map(off, seSize-off); err != nil || e.Len != want.Len || e.State != want.State {
			t.Errorf("at %d is %+v, %v; want %+v", off, e, err, want)
		}
	}
}

func TestSESparse_Refuses(t *testing.T) {
	put := func(off int64, v uint64) func(*testing.T, vfs.FS) {
		return func(t *testing.T, fsys vfs.FS) {
			poke(t, fsys, "e.vmdk", off, binary.LittleEndian.AppendUint64(nil, v)...)
		}
	}
	for name, c := range map[string]struct {
		change  func(t *testing.T, fsys vfs.FS)
		message string
		is      error
	}{
		"version":          {put(8, 0x200000002), "seSparse version 0x200000002", block.ErrUnsupported},
		"grains":           {put(24, 16), "grains of 16 sectors, want 8", block.ErrUnsupported},
		"tables":           {put(32, 128), "grain tables of 128 sectors, want 64", block.ErrUnsupported},
		"flags":            {put(40, 1), "flags 0x1", block.ErrUnsupported},
		"reserved":         {put(72, 1), "what they mean is not known", block.ErrUnsupported},
		"padding":          {put(504, 1), "says more than is known", block.ErrUnsupported},
		"no capacity":      {put(16, 0), "capacity is 0 sectors", block.ErrCorrupt},
		"huge capacity":    {put(16, 1<<60), "want at most 4194304", block.ErrCorrupt},
		"small capacity":   {put(16, 8), "the descriptor gives it 40960 sectors, its header 8", block.ErrCorrupt},
		"directory":        {put(128, 1<<40), "grain directory, 1 sectors at sector 1099511627776, lies outside", block.ErrCorrupt},
		"short directory":  {put(136, 0), "need an entry each", block.ErrCorrupt},
		"huge directory":   {put(136, 1<<62), "need an entry each", block.ErrCorrupt},
		"tables outside":   {put(144, 1<<50), "tables start at sector", block.ErrCorrupt},
		"grains wrap":      {put(192, 1<<63), "grains at sector", block.ErrCorrupt},
		"volatile outside": {put(80, 1<<63), "volatile header at sector", block.ErrCorrupt},
		"no volatile":      {put(seVolatile, 1), "volatile header starts with 0x1", block.ErrCorrupt},
		"not closed":       {put(seVolatile+24, 1), "was not closed, and its journal has to be replayed", block.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSESparse(t)
			c.change(t, fsys)
			_, err := memTryOpen(fsys, "a.vmdk", vfs.ReadOnly)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v that says %q", err, c.is, c.message)
			}
		})
	}
}

// A bad entry harms those who ask for its grain, and a check finds it.
func TestSESparse_BadEntries(t *testing.T) {
	for name, c := range map[string]struct {
		off, value uint64
		guest      int64
		message    string
	}{
		"kind 0 with a number": {seTables + 8, 5, seGrain, "grain 1 "},
		"unknown kind":         {seTables + 8, 0x4000000000000000, seGrain, "of an unknown kind"},
		"past the end":         {seTables + 8, 0x3003000000000000, seGrain, "outside the grains"},
		"far past the end":     {seTables + 8, 0x3fffffffffffffff, seGrain, "outside the grains"},
		"table past the end":   {seDirectory, 0x1000000000000002, 0, "grain directory entry 0"},
		"far table":            {seDirectory, 0x10000000ffffffff, 0, "grain directory entry 0"},
		"unknown table":        {seDirectory, 0x2000000000000000, 0, "of an unknown kind"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSESparse(t)
			poke(t, fsys, "e.vmdk", int64(c.off), binary.LittleEndian.AppendUint64(nil, c.value)...)
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
			p := make([]byte, seGrain)
			if _, err := image.ReadAt(p, c.guest); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v that says %q", err, block.ErrCorrupt, c.message)
			}
			if _, err := image.ReadAt(p, 18<<20); err != nil {
				t.Errorf("elsewhere: %v", err)
			}
			if found := problems(t, image); len(found) == 0 || !strings.Contains(found[0].Text, c.message) {
				t.Errorf("check: %+v", found)
			}
		})
	}
	fsys := newSESparse(t)
	poke(t, fsys, "e.vmdk", seTables+8, binary.LittleEndian.AppendUint64(nil, 0x3002000000000000)...)
	found := checkMem(t, fsys, false)
	if found.Corruptions != 1 || !strings.Contains(found.Problems[0].Text, "grain number 2 is another's, too") {
		t.Errorf("two owners: %+v", found)
	}
}

// FuzzSESparse damages an extent and reads it.
func FuzzSESparse(f *testing.F) {
	intact := newSESparse(f)
	patch := func(off uint32, value uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, off), value)
	}
	f.Add(uint64(0), []byte{})
	f.Add(uint64(1), patch(seTables+16, 0x3000000000000001))
	f.Add(uint64(2), patch(seDirectory+8, 0x1000000000000000))
	f.Add(uint64(3), append(patch(16, 1<<36), patch(136, 1<<16)...))
	f.Add(uint64(4), patch(192, 1<<52))
	f.Fuzz(func(t *testing.T, seed uint64, patches []byte) {
		fsys := intact.Clone()
		for size := uint32(seGrains + 3*seGrain - 8); len(patches) >= 12; patches = patches[12:] {
			poke(t, fsys, "e.vmdk", int64(binary.LittleEndian.Uint32(patches)%size), patches[4:12]...)
		}
		began := time.Now()
		image, err := memTryOpen(fsys, "a.vmdk", vfs.ReadWrite)
		if err != nil {
			return
		}
		defer image.Close()
		r := rand.New(rand.NewPCG(seed, 3))
		for range 20 {
			off := r.Int64N(seSize)
			n := min(1+r.Int64N(64<<10), seSize-off)
			useOnce(t, image, r, off, n)
		}
		checkDamaged(t, fsys, vfs.ReadOnly)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}
