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
	seJournal   = 8 * 512
	seDirectory = 64 * 512
	seTables    = 72 * 512
	seBitmap    = 200 * 512
	seBackMap   = 208 * 512
	seGrains    = 288 * 512
	seGrain     = 4096
)

// seLayout is where the regions of an extent are, in sectors.
type seLayout struct {
	capacity                                    int64
	directory, tables, bitmap, backMap, grains  int64
	directoryLen, tablesLen, bitmapLen, backLen int64
}

// newSELayout lays an extent out as ESXi does, but for the empty space.
func newSELayout(sizeBytes int64) seLayout {
	up := func(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
	l := seLayout{capacity: sizeBytes / 512, directory: seDirectory / 512}
	grains := up(sizeBytes, seGrain) / seGrain
	tables := (grains-1)/4096 + 1
	l.directoryLen, l.tablesLen = up(tables*8, seGrain)/512, tables*64
	l.bitmapLen, l.backLen = up(up(grains, 8)/8, seGrain)/512, up(grains*8, seGrain)/512
	l.tables = l.directory + l.directoryLen
	l.bitmap = l.tables + l.tablesLen
	l.backMap = l.bitmap + l.bitmapLen
	l.grains = l.backMap + l.backLen
	return l
}

// extent returns an extent that holds nothing.
func (l seLayout) extent() []byte {
	p := make([]byte, l.grains*512)
	put64(p, 0, 0xcafebabe, 0x200000001, uint64(l.capacity), 8, 64, 0, 0, 0, 0, 0, seVolatile/512, 1, 2, 2, seJournal/512, 56,
		uint64(l.directory), uint64(l.directoryLen), uint64(l.tables), uint64(l.tablesLen), uint64(l.bitmap), uint64(l.bitmapLen),
		uint64(l.backMap), uint64(l.backLen), uint64(l.grains), uint64(l.capacity+7)/8*8)
	put64(p, seVolatile, 0xcafecafe, 0, 7, 0)
	put64(p, 1024, 0xdeafc0de, 7, 1)
	return p
}

func put64(p []byte, off int, values ...uint64) {
	for i, v := range values {
		binary.LittleEndian.PutUint64(p[off+8*i:], v)
	}
}

// newSESparse returns an seSparse image in a.vmdk, whose extent is e.vmdk.
func newSESparse(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	l := newSELayout(seSize)
	if l.tables*512 != seTables || l.bitmap*512 != seBitmap || l.backMap*512 != seBackMap || l.grains*512 != seGrains {
		t.Fatalf("the layout is %+v", l)
	}
	p := append(l.extent(), make([]byte, 3*seGrain)...)
	put64(p, seVolatile+8, 1)
	put64(p, seDirectory, 0x1000000000000000)
	put64(p, seTables, 0x3002000000000000, 0x3000000000000000, 0x2000000000000000, 0x1000000000000000, 0, 0x3001000000000000)
	put64(p, seBitmap, 1<<64-1)
	put64(p, seBackMap, 0x1001000000000000, 0x1005000000000000, 0x1000000000000000)
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
	both := func(a, b func(*testing.T, vfs.FS)) func(*testing.T, vfs.FS) {
		return func(t *testing.T, fsys vfs.FS) {
			a(t, fsys)
			b(t, fsys)
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
		"directory":        {put(128, 1<<40), "grain directory, 8 sectors at sector 1099511627776, lies outside", block.ErrCorrupt},
		"short directory":  {put(136, 0), "need an entry each", block.ErrCorrupt},
		"huge directory":   {put(136, 1<<62), "need an entry each", block.ErrCorrupt},
		"tables outside":   {put(144, 1<<50), "tables start at sector", block.ErrCorrupt},
		"grains wrap":      {put(192, 1<<63), "grains at sector", block.ErrCorrupt},
		"volatile outside": {put(80, 1<<63), "volatile header at sector", block.ErrCorrupt},
		"no volatile":      {put(seVolatile, 1), "volatile header starts with 0x1", block.ErrCorrupt},
		"not closed":       {both(put(seVolatile+24, 1), put(seJournal, 0xc0ffef)), "was not closed, and its journal cannot be replayed here", block.ErrUnsupported},
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

// FuzzSESparse damages an extent that was closed, or one whose journal has to be replayed,
// and checks, reads, writes and repairs it.
func FuzzSESparse(f *testing.F) {
	bases := []*vfs.Mem{newSESparse(f), newDirtySESparse(f)}
	patch := func(off uint32, value uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, off), value)
	}
	for seed := range uint64(2) { // an even one damages the first, an odd one the second
		f.Add(seed, []byte{})
		f.Add(seed+2, patch(seTables+16, 0x3000000000000001))
		f.Add(seed+4, patch(seDirectory+8, 0x1000000000000000))
		f.Add(seed+6, append(patch(16, 1<<36), patch(136, 1<<16)...))
		f.Add(seed+8, patch(192, 1<<52))
		f.Add(seed+10, patch(seBitmap, 0))
		f.Add(seed+12, patch(seBackMap+24, 0x1001000000000000))
		f.Add(seed+14, append(patch(160, 1<<20), patch(176, 1<<20)...))
		f.Add(seed+16, patch(seVolatile+8, 1<<40))
		f.Add(seed+18, patch(seJournal+24, 25))
		f.Add(seed+20, append(patch(seJournal+40, 8), patch(seJournal+128, seTables/512)...))
		f.Add(seed+22, patch(seJournal+25*512+512*4+16, 0x3000000000000000))
	}
	f.Fuzz(func(t *testing.T, seed uint64, patches []byte) {
		fsys := bases[seed%2].Clone()
		for range 64 {
			if len(patches) < 12 {
				break
			}
			const size = seGrains + 3*seGrain - 8
			poke(t, fsys, "e.vmdk", int64(binary.LittleEndian.Uint32(patches)%size), patches[4:12]...)
			patches = patches[12:]
		}
		fsys.SetCapacity(64 << 20)
		began := time.Now()
		useDamagedSE(t, fsys, rand.New(rand.NewPCG(seed, 3)))
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func useDamagedSE(t *testing.T, fsys *vfs.Mem, r *rand.Rand) {
	checkDamaged(t, fsys, vfs.ReadOnly)
	image, err := memTryOpen(fsys, "a.vmdk", vfs.ReadWrite)
	if err != nil {
		return
	}
	size := image.Info().SizeBytes
	written := false
	for range 20 {
		off := r.Int64N(size)
		if r.IntN(2) == 0 {
			off = r.Int64N(min(size, 8*seGrain))
		}
		useOnce(t, image, r, off, min(1+r.Int64N(64<<10), size-off))
	}
	if _, err := image.WriteAt([]byte{'w'}, 0); err == nil {
		written = true // so nothing was found to be wrong
	}
	err = image.Close()
	if !written || err != nil {
		checkDamaged(t, fsys, vfs.ReadWrite)
		return
	}
	if found := checkMem(t, fsys, false); found.Corruptions != 0 {
		t.Errorf("what was written is corrupt: %+v", found.Problems)
	}
}
