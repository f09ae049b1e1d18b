package vmdk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// transaction fills a slot of a journal: sectors of the file, and what they become.
func transaction(p []byte, journal, slot int, sequence uint64, sectors ...[]byte) {
	at := journal + slot*25*512
	put64(p, at, 0xc0ffee, 1, uint64(slot), uint64(len(sectors)+1), 0x1234567812345678, sequence, 1<<64-1, 99)
	for i, s := range sectors {
		put64(p, at+128+16*i, binary.LittleEndian.Uint64(s), 1)
		copy(p[at+512*(i+1):], s[8:])
	}
}

// sectorOf returns a copy of the sector of a file around an offset, for transaction, after
// values have been put into it there.
func sectorOf(p []byte, off int, values ...uint64) []byte {
	start := off / 512 * 512
	s := append(binary.LittleEndian.AppendUint64(nil, uint64(start/512)), p[start:start+512]...)
	put64(s, 8+off-start, values...)
	return s
}

// newDirtySESparse is newSESparse after ESXi had lost power: two transactions are in the
// journal, and nothing of them in place. The first gives guest grain 4 the grain 3; the
// second adds a table and gives guest grain 4097 the grain 4. The contents are dirtyContents.
func newDirtySESparse(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := newSESparse(t)
	p := append(peek(t, fsys, "e.vmdk"), bytes.Repeat([]byte{'d'}, seGrain)...)
	p = append(p, bytes.Repeat([]byte{'e'}, seGrain)...)
	transaction(p, seJournal, 0, 6,
		sectorOf(p, seBackMap+8*3, 0x1004000000000000), sectorOf(p, seTables+8*4, 0x3003000000000000))
	transaction(p, seJournal, 1, 7,
		sectorOf(p, seVolatile+8, 2), sectorOf(p, seBackMap+8*3, 0x1004000000000000, 0x1001000000000001),
		sectorOf(p, seDirectory+8, 0x1000000000000001), sectorOf(p, seTables+4096*8+8, 0x3004000000000000))
	put64(p, seVolatile+24, 1)
	if err := fsys.Remove("e.vmdk"); err != nil {
		t.Fatal(err)
	}
	addFile(t, fsys, "e.vmdk", p)
	return fsys
}

func dirtyContents() []byte {
	p := seContents()
	copy(p[4*seGrain:], bytes.Repeat([]byte{'d'}, seGrain))
	copy(p[4097*seGrain:], bytes.Repeat([]byte{'e'}, seGrain))
	return p
}

func TestSESparse_Replay(t *testing.T) {
	fsys := newDirtySESparse(t)
	before := peek(t, fsys, "e.vmdk")
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
	if !bytes.Equal(readGuest(t, image), dirtyContents()) {
		t.Error("it does not read as the journal says")
	}
	if found := problems(t, image); len(found) != 1 || !strings.Contains(found[0].Text, "its journal of 2 transactions has to be replayed") {
		t.Errorf("check: %+v", found)
	}
	image.Close()
	if !bytes.Equal(peek(t, fsys, "e.vmdk"), before) {
		t.Error("reading has changed the file")
	}
	if fixed := checkMem(t, fsys, true); fixed.FixedProblems != 1 || fixed.Corruptions != 0 {
		t.Errorf("repaired %+v", fixed)
	}
	p := peek(t, fsys, "e.vmdk")
	if got := p[seVolatile : seVolatile+32]; !bytes.Equal(got[8:], le64(2, 8, 0)) {
		t.Errorf("the volatile header is %x", got)
	}
	if got := p[1024:1048]; !bytes.Equal(got, le64(0xdeafc0de, 8, 1)) {
		t.Errorf("the journal header is %x", got)
	}
	image = memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), dirtyContents()) {
		t.Error("once repaired it reads as something else")
	}
	checkClean(t, image)
	if _, err := image.WriteAt([]byte{'x'}, 0); err != nil {
		t.Fatal(err)
	}
	if sequences, err := vmdk.SESparseJournal(peek(t, fsys, "e.vmdk")); err != nil || len(sequences) != 0 {
		t.Errorf("transactions %v, %v, are left, which would undo what is written", sequences, err)
	}
}

func le64(values ...uint64) []byte {
	p := make([]byte, 8*len(values))
	put64(p, 0, values...)
	return p
}

// Power is lost at every single change that replaying and the first write make.
func TestSESparse_ReplayCrashes(t *testing.T) {
	r := testenv.Rand(t)
	mem := newDirtySESparse(t)
	for _, name := range []string{"a.vmdk", "e.vmdk"} {
		if err := changeFile(mem, name, func(vfs.File) error { return nil }); err != nil { // durable
			t.Fatal(err)
		}
	}
	if err := mem.SyncDir("."); err != nil {
		t.Fatal(err)
	}
	points, contents := 0, dirtyContents()
	hook := func(vfs.Op) error {
		points++
		for range 4 {
			image := memOpen(t, mem.Crash(r), "a.vmdk", vfs.ReadWrite)
			for _, grain := range []int{0, 1, 2, 4, 5, 4097} {
				got := make([]byte, seGrain)
				if _, err := image.ReadAt(got, int64(grain)*seGrain); err != nil {
					t.Fatal(err)
				}
				if grain == 4 {
					copy(got, bytes.Repeat([]byte{'d'}, 512)) // may be written over
				}
				if !bytes.Equal(got, contents[grain*seGrain:][:seGrain]) {
					t.Fatalf("at change %d: a crash leaves other contents in grain %d", points, grain)
				}
			}
			if _, err := image.WriteAt([]byte{'y'}, 8*seGrain); err != nil {
				t.Fatal(err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
		}
		return nil
	}
	image := memOpen(t, vfs.Inject(mem, vfs.If(vfs.Changing, hook)), "a.vmdk", vfs.ReadWrite)
	if _, err := image.WriteAt(bytes.Repeat([]byte{'x'}, 512), 4*seGrain); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if points < 10 {
		t.Errorf("only %d changes", points)
	}
}

// What a crash can have torn is dropped, and what cannot be told is refused.
func TestSESparse_ReplayJudges(t *testing.T) {
	const second = seJournal + 25*512
	withoutSecond := dirtyContents()
	clear(withoutSecond[4097*seGrain:][:seGrain])
	for name, c := range map[string]struct {
		change  func(p []byte)
		want    []byte // nil: it is refused
		message string
	}{
		"last torn: zeroes":        {func(p []byte) { clear(p[second+512*4 : second+512*5]) }, withoutSecond, ""},
		"last torn: an old sector": {func(p []byte) { copy(p[second+512*2:second+512*3], p[seBackMap:]) }, withoutSecond, ""},
		"last torn, and undone": {func(p []byte) {
			clear(p[second+512*4 : second+512*5])
			put64(p, seBackMap+8*4, 0x1001000000000001)
		}, withoutSecond, ""},
		"last torn, partly in place": {func(p []byte) {
			clear(p[second+512*4 : second+512*5])
			put64(p, seDirectory+8, 0x1000000000000001)
			put64(p, seTables+4096*8+8, 0x3004000000000000)
		}, nil, "names grain number 4, whose back map is 0x0"},
		"first damaged":                {func(p []byte) { put64(p, seJournal+512*2+8*4, 0x3002000000000000) }, nil, "the back map of grain number 3 names entry 4 of grain table 0, which is 0x3002000000000000"},
		"two of one number":            {func(p []byte) { put64(p, second+40, 6) }, nil, "two transactions of number 6"},
		"first is missing":             {func(p []byte) { put64(p, seJournal+40, 3) }, seContents(), ""},
		"unknown header":               {func(p []byte) { put64(p, second+48, 5) }, nil, "what else means is not known"},
		"other slot":                   {func(p []byte) { put64(p, second+16, 0) }, nil, "its own slot"},
		"too long":                     {func(p []byte) { put64(p, second+24, 26) }, nil, "has 26 sectors, want 1 to 25"},
		"empty":                        {func(p []byte) { put64(p, second+24, 0) }, nil, "has 0 sectors"},
		"target is the const header":   {func(p []byte) { put64(p, second+128, 0) }, nil, "want 1 in the volatile header"},
		"target is a grain":            {func(p []byte) { put64(p, second+128, seGrains/512) }, nil, "want 1 in the volatile header"},
		"target is the journal":        {func(p []byte) { put64(p, second+128, seJournal/512) }, nil, "want 1 in the volatile header"},
		"many at once":                 {func(p []byte) { put64(p, second+136, 2) }, nil, "changes 2 sectors"},
		"table named twice":            {func(p []byte) { put64(p, second+512*3+8, 0x1000000000000000) }, withoutSecond, ""},
		"grain outside":                {func(p []byte) { put64(p, second+512*4+8, 0x3fff000000000000) }, withoutSecond, ""},
		"bitmap unmarked":              {func(p []byte) { put64(p, seBitmap, 7) }, nil, "3 of the grains 0 to 63 are marked"},
		"journal header":               {func(p []byte) { put64(p, 1024, 5) }, nil, "the journal header starts with 0x5"},
		"nothing in the journal":       {func(p []byte) { clear(p[seJournal : seJournal+50*512]) }, seContents(), ""},
		"bitmap where the back map is": {func(p []byte) { put64(p, 160, seBackMap/512) }, nil, "overlap"},
		"long journal":                 {func(p []byte) { put64(p, 120, 1<<40) }, nil, "the seSparse journal, 1099511627776 sectors"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newDirtySESparse(t)
			p := peek(t, fsys, "e.vmdk")
			c.change(p)
			poke(t, fsys, "e.vmdk", 0, p...)
			image, err := memTryOpen(fsys, "a.vmdk", vfs.ReadWrite)
			if c.want == nil {
				if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "its journal cannot be replayed here") || !strings.Contains(err.Error(), c.message) {
					t.Errorf("error %v, want one that says %q", err, c.message)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer image.Close()
			if !bytes.Equal(readGuest(t, image), c.want) {
				t.Error("it reads as something else")
			}
		})
	}
}

// sampleExtent returns the directory of an image whose extent ESXi has written, and that
// extent.
func sampleExtent(t *testing.T) (dir string, extent []byte) {
	t.Helper()
	dir = unpack(t, filepath.Join(testenv.Samples(t), "dissect.hypervisor"))
	extent, err := os.ReadFile(filepath.Join(dir, "sesparse.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	return dir, extent
}

// Where things lie in the sample, and what its transactions are about.
const (
	sampleJournal = 2048 * 512
	sampleTables  = 6144 * 512
	sampleBitmap  = 8192 * 512
	sampleBackMap = 10240 * 512
	sampleGrains  = 12288 * 512
	sampleSize    = 512 << 20
	sampleData    = 16 << 20
	sampleLast    = sampleJournal + 31*25*512
)

func TestSESparse_SampleJournal(t *testing.T) {
	_, extent := sampleExtent(t)
	sequences, err := vmdk.SESparseJournal(extent)
	var want []uint64
	for i := range uint64(32) {
		want = append(want, 4+i)
	}
	if err != nil || !slices.Equal(sequences, want) {
		t.Errorf("the journal has transactions %v, %v; want %v", sequences, err, want)
	}
}

// An extent of ESXi's is wound back to what it can have been when power was lost.
func TestSESparse_SampleReplay(t *testing.T) {
	dir, extent := sampleExtent(t)
	const before = 31 * 128 * seGrain // what the last transaction begins at
	undoLast := func(p []byte) {
		clear(p[sampleBackMap+31*1024 : sampleBackMap+32*1024])
		clear(p[sampleTables+31*1024 : sampleTables+32*1024])
		clear(p[sampleBitmap+31*16 : sampleBitmap+32*16])
	}
	for name, c := range map[string]struct {
		change func(p []byte)
		want   int // how many bytes "a" it reads as, then zeroes; 0: it is refused
	}{
		"all in place":          {func([]byte) {}, sampleData},
		"nothing in place":      {func(p []byte) { clear(p[sampleTables : sampleTables+32768]); clear(p[sampleBitmap:sampleGrains]) }, sampleData},
		"last not in place":     {undoLast, sampleData},
		"bitmap not in place":   {func(p []byte) { clear(p[sampleBitmap+31*16 : sampleBitmap+32*16]) }, sampleData},
		"back map not in place": {func(p []byte) { clear(p[sampleBackMap+512*9 : sampleBackMap+512*20]) }, sampleData},
		"last torn": {func(p []byte) {
			undoLast(p)
			clear(p[sampleLast+4*512 : sampleLast+6*512])
		}, before},
		"last torn, its slot was used": {func(p []byte) {
			undoLast(p)
			copy(p[sampleLast+2*512:sampleLast+6*512], p[sampleJournal+2*512:])
		}, before},
		"last torn, partly in place": {func(p []byte) {
			clear(p[sampleBackMap+31*1024 : sampleBackMap+32*1024])
			clear(p[sampleLast+2*512 : sampleLast+3*512])
		}, 0},
		"damaged in the middle": {func(p []byte) {
			put64(p, sampleJournal+10*25*512+2*512+64, 0x1000000000000000)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := slices.Clone(extent)
			put64(p, 512+24, 1)
			c.change(p)
			file := filepath.Join(dir, "sesparse.vmdk")
			if err := os.WriteFile(file, p, 0o600); err != nil {
				t.Fatal(err)
			}
			image, err := openDir(t, dir, "sesparse-descriptor.vmdk", vfs.ReadOnly)
			if c.want == 0 {
				if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "start and stop its machine on ESXi") {
					t.Errorf("error %v, want a refusal", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			judgeSample(t, image, c.want)
			image.Close()
			repairDir(t, dir, "sesparse-descriptor.vmdk")
			got, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if c.want == sampleData && !bytes.Equal(got, extent) {
				t.Error("once replayed, the file is not what ESXi has left when it closed it")
			}
			image = mustOpen(t, dir, "sesparse-descriptor.vmdk", vfs.ReadOnly)
			checkClean(t, image)
			image.Close()
		})
	}
}

// judgeSample fails the test unless an image of the sample's size reads as n bytes "a" and
// holds nothing behind them.
func judgeSample(t *testing.T, image *formats.Image, n int) {
	t.Helper()
	p := make([]byte, n)
	if _, err := image.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{'a'}, n)) {
		t.Error("it reads as something else")
	}
	if e, err := image.Map(int64(n), int64(sampleSize-n)); err != nil || e.State != block.Unallocated || e.Len != int64(sampleSize-n) {
		t.Errorf("behind its data is %+v, %v", e, err)
	}
}

// repairDir repairs an image in a directory of the host.
func repairDir(t *testing.T, dir, name string) engine.CheckResult {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	layer, err := vmdk.Format{}.Open(formats.OpenRequest{FS: d, Name: name, Mode: vfs.ReadWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	return result
}
