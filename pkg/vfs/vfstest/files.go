package vfstest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"sync"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func testReadWrite(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", nil)
	if f.Name() != "f" {
		t.Errorf("name %q", f.Name())
	}
	write(t, f, []byte("end"), 10000)
	want := append(make([]byte, 10000), "end"...)
	wantContents(t, f, want)

	p := pattern('x', 10)
	if n, err := f.ReadAt(p, 9999); n != 4 || err != io.EOF || string(p) != "\x00endxxxxxx" {
		t.Errorf("read over the end: %d, %v, %q", n, err, p)
	}
	if n, err := f.ReadAt(p, 10003); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d, %v", n, err)
	}
	if n, err := f.ReadAt(p, 1<<40); n != 0 || err != io.EOF {
		t.Errorf("read far past the end: %d, %v", n, err)
	}
	if n, err := f.ReadAt(nil, 0); n != 0 || err != nil {
		t.Errorf("read nothing: %d, %v", n, err)
	}
	write(t, f, nil, 20000)
	if size(t, f) != 10003 {
		t.Errorf("writing nothing changed the length to %d", size(t, f))
	}
	must(t, f.Sync())
	must(t, fsys.SyncDir("."))
	wantContents(t, f, want)
}

func testTwoOpens(t *testing.T, fsys vfs.FS) {
	w := create(t, fsys, "f", []byte("first"))
	r := open(t, fsys, "f", vfs.ReadOnly)
	w2 := open(t, fsys, "f", vfs.ReadWrite)
	write(t, w, []byte("F"), 0)
	write(t, w2, []byte("T"), 4)
	wantContents(t, r, []byte("FirsT"))
	must(t, w.Close())
	wantContents(t, r, []byte("FirsT"))
}

func testOpenCreate(t *testing.T, fsys vfs.FS) {
	create(t, fsys, "f", []byte("kept"))
	must(t, fsys.Mkdir("d"))
	for _, name := range []string{"f", "d", "."} {
		_, err := fsys.Create(name)
		wantErr(t, "create "+name, err, fs.ErrExist)
		wantErr(t, "mkdir "+name, fsys.Mkdir(name), fs.ErrExist)
	}
	for _, name := range []string{"missing", "missing/f", "d/missing"} {
		_, err := fsys.Open(name, vfs.ReadOnly)
		wantErr(t, "open "+name, err, fs.ErrNotExist)
	}
	_, err := fsys.Create("missing/f")
	wantErr(t, "create in nowhere", err, fs.ErrNotExist)
	for _, mode := range []vfs.Mode{vfs.ReadOnly, vfs.ReadWrite} {
		for _, name := range []string{"d", "."} {
			_, err := fsys.Open(name, mode)
			wantErr(t, "open directory "+name, err, fs.ErrInvalid)
		}
	}
	if _, err := fsys.Open("f/below", vfs.ReadOnly); err == nil {
		t.Error("opened a file below a file")
	}
	wantContents(t, open(t, fsys, "f", vfs.ReadOnly), []byte("kept"))
}

func testReadOnly(t *testing.T, fsys vfs.FS) {
	create(t, fsys, "f", []byte("kept"))
	f := open(t, fsys, "f", vfs.ReadOnly)
	_, err := f.WriteAt([]byte("x"), 0)
	wantErr(t, "write", err, block.ErrReadOnly)
	wantErr(t, "truncate", f.Truncate(0), block.ErrReadOnly)
	wantErr(t, "allocate", f.Allocate(0, 1<<20), block.ErrReadOnly)
	wantErr(t, "punch", f.PunchHole(0, 4), block.ErrReadOnly)
	must(t, f.Sync())
	wantContents(t, f, []byte("kept"))
}

func testTruncate(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", pattern('a', 10000))
	must(t, f.Truncate(5000))
	wantContents(t, f, pattern('a', 5000))
	must(t, f.Truncate(12000))
	want := append(pattern('a', 5000), make([]byte, 7000)...)
	wantContents(t, f, want)
	write(t, f, []byte("b"), 12005)
	wantContents(t, f, append(want, 0, 0, 0, 0, 0, 'b'))
	must(t, f.Truncate(0))
	if n := allocated(t, f); n != 0 {
		t.Errorf("an empty file occupies %d bytes", n)
	}
	must(t, f.Truncate(8<<20))
	if n := allocated(t, f); n != 0 {
		t.Errorf("a file that only grew by Truncate occupies %d bytes", n)
	}
	wantContents(t, f, make([]byte, 8<<20))
}

func testAllocate(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", pattern('a', 5000))
	supported(t, f.Allocate(1000, 1<<20))
	want := append(pattern('a', 5000), make([]byte, 1000+1<<20-5000)...)
	wantContents(t, f, want)
	if n := allocated(t, f); n < 1<<20 {
		t.Errorf("%d bytes allocated, want at least %d", n, 1<<20)
	}
	must(t, f.Allocate(0, 4096))
	wantContents(t, f, want)
	must(t, f.Allocate(2<<20, 0))
	if size(t, f) != int64(len(want)) {
		t.Errorf("allocating nothing changed the length to %d", size(t, f))
	}
	write(t, f, []byte("b"), 100000)
	want[100000] = 'b'
	wantContents(t, f, want)
}

func testPunchHole(t *testing.T, fsys vfs.FS) {
	const length = 1<<20 + 100
	want := pattern('a', length)
	f := create(t, fsys, "f", want)
	must(t, f.Sync())
	before := allocated(t, f)
	punch := func(off, n int64) {
		t.Helper()
		supported(t, f.PunchHole(off, n))
		if off < length {
			clear(want[off:min(off+n, length)])
		}
		wantContents(t, f, want)
	}
	punch(64<<10, 512<<10)
	if n := allocated(t, f); n > before-(512<<10) {
		t.Errorf("%d bytes allocated, had been %d before 512 KiB were punched", n, before)
	}
	punch(1, 5)
	punch(1023, 4000)
	punch(700<<10+1, 8191)
	punch(1<<20+50, 4096) // over the end
	punch(2<<20, 4096)    // past the end
	punch(0, 0)
	write(t, f, []byte("new"), 100<<10)
	copy(want[100<<10:], "new")
	wantContents(t, f, want)
}

func testNextData(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", nil)
	if _, _, err := f.NextData(0); err != io.EOF {
		t.Errorf("next data of an empty file: %v, want EOF", err)
	}
	must(t, f.Truncate(8<<20))
	write(t, f, pattern('a', 4096), 1<<20)
	write(t, f, pattern('b', 100), 6<<20)
	must(t, f.Sync())
	for _, at := range []int64{1 << 20, 1<<20 + 4095, 6 << 20, 6<<20 + 99} {
		start, end, err := f.NextData(at)
		if err != nil || start != at || end <= at || end > 8<<20 {
			t.Errorf("next data at %d: [%d, %d), %v; want it to start there", at, start, end, err)
		}
	}
	if start, end, err := f.NextData(0); err != nil || start > 1<<20 || end <= start {
		t.Errorf("next data at 0: [%d, %d), %v", start, end, err)
	}
	for _, at := range []int64{8 << 20, 1 << 40} {
		if _, _, err := f.NextData(at); err != io.EOF {
			t.Errorf("next data at %d, not before the end: %v, want EOF", at, err)
		}
	}
}

func testBadRanges(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", []byte("kept"))
	_, err := f.ReadAt(make([]byte, 4), -1)
	wantErr(t, "read at -1", err, fs.ErrInvalid)
	_, err = f.WriteAt([]byte("x"), -1)
	wantErr(t, "write at -1", err, fs.ErrInvalid)
	wantErr(t, "truncate to -1", f.Truncate(-1), fs.ErrInvalid)
	wantErr(t, "lock for nothing", f.Lock(vfs.LockKind(7)), fs.ErrInvalid)
	_, _, err = f.NextData(-1)
	wantErr(t, "next data at -1", err, fs.ErrInvalid)
	for _, r := range [][2]int64{{-1, 10}, {0, -1}, {math.MaxInt64, 1}} {
		wantErr(t, fmt.Sprint("allocate", r), f.Allocate(r[0], r[1]), fs.ErrInvalid)
		wantErr(t, fmt.Sprint("punch", r), f.PunchHole(r[0], r[1]), fs.ErrInvalid)
	}
	_, err = f.WriteAt([]byte("x"), math.MaxInt64)
	wantErr(t, "write at the greatest offset", err, fs.ErrInvalid)
	wantContents(t, f, []byte("kept"))
}

func testClosed(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", []byte("kept"))
	must(t, f.Close())
	_, readErr := f.ReadAt(make([]byte, 1), 0)
	_, writeErr := f.WriteAt(make([]byte, 1), 0)
	_, sizeErr := f.Size()
	_, allocatedErr := f.AllocatedBytes()
	_, _, nextErr := f.NextData(0)
	for op, err := range map[string]error{
		"read": readErr, "write": writeErr, "size": sizeErr, "allocated": allocatedErr, "next data": nextErr,
		"truncate": f.Truncate(0), "sync": f.Sync(), "allocate": f.Allocate(0, 10), "punch": f.PunchHole(0, 10),
		"lock": f.Lock(vfs.LockRead), "close": f.Close(),
	} {
		wantErr(t, op+" a closed file", err, fs.ErrClosed)
	}
}

// testModel does random operations on a file and on a byte slice.
func testModel(t *testing.T, fsys vfs.FS) {
	r := testenv.Rand(t)
	steps := 2000
	if testing.Short() {
		steps = 300
	}
	const limit = 1 << 20
	f := create(t, fsys, "f", nil)
	var model []byte
	grow := func(n int64) {
		if n > int64(len(model)) {
			model = append(model, make([]byte, n-int64(len(model)))...)
		}
	}
	for range steps {
		off, n := r.Int64N(limit), r.Int64N(32<<10)
		if r.IntN(2) == 0 {
			off, n = off&^4095, n&^511
		}
		switch r.IntN(12) {
		case 0:
			must(t, f.Truncate(off))
			grow(off)
			model = model[:off:off]
		case 1:
			err := f.Allocate(off, n)
			if errors.Is(err, errors.ErrUnsupported) {
				continue
			}
			must(t, err)
			if n > 0 {
				grow(off + n)
			}
		case 2, 3:
			err := f.PunchHole(off, n)
			if errors.Is(err, errors.ErrUnsupported) {
				continue
			}
			must(t, err)
			if size := int64(len(model)); off < size {
				clear(model[off:min(off+n, size)])
			}
		case 4:
			must(t, f.Sync())
		case 5:
			checkNextData(t, f, model)
		case 6, 7, 8:
			checkRead(t, f, model, off, n)
		default:
			p := pattern(byte(1+r.IntN(255)), int(n))
			write(t, f, p, off)
			if n > 0 {
				grow(off + n)
				copy(model[off:], p)
			}
		}
	}
	wantContents(t, f, model)
	must(t, f.Sync())
	must(t, f.Close())
	wantContents(t, open(t, fsys, "f", vfs.ReadOnly), model)
}

func checkRead(t *testing.T, f vfs.File, model []byte, off, n int64) {
	t.Helper()
	got := make([]byte, n)
	m, err := f.ReadAt(got, off)
	var want []byte
	if off < int64(len(model)) {
		want = model[off:min(off+n, int64(len(model)))]
	}
	if m != len(want) || !bytes.Equal(got[:m], want) || (err == io.EOF) != (m < len(got)) || err != nil && err != io.EOF {
		t.Fatalf("read %d bytes at %d of %d: %d, %v; contents right: %v", n, off, len(model), m, err, bytes.Equal(got[:m], want))
	}
}

// checkNextData walks over a file's data: what is between must be zeroes.
func checkNextData(t *testing.T, f vfs.File, model []byte) {
	t.Helper()
	at := int64(0)
	for {
		start, end, err := f.NextData(at)
		if err == io.EOF {
			start, end = int64(len(model)), int64(len(model))
		} else if err != nil || start < at || end <= start || end > int64(len(model)) {
			t.Fatalf("next data at %d of %d: [%d, %d), %v", at, len(model), start, end, err)
		}
		if i := bytes.IndexFunc(model[at:start], func(c rune) bool { return c != 0 }); i >= 0 {
			t.Fatalf("byte %d is not zero, but the next data at %d is at %d", at+int64(i), at, start)
		}
		if err == io.EOF {
			return
		}
		at = end
	}
}

// testConcurrent lets goroutines write and read ranges of their own in one file.
func testConcurrent(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", nil)
	const workers, length = 8, 10000
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			off := int64(w) * length
			for round := range 20 {
				want := pattern(byte(w*20+round+1), length)
				got := make([]byte, length)
				_, writeErr := f.WriteAt(want, off)
				n, readErr := f.ReadAt(got, off)
				if readErr == io.EOF && n == length {
					readErr = nil
				}
				if err := errors.Join(writeErr, readErr, f.Sync()); err != nil || !bytes.Equal(got, want) {
					t.Errorf("worker %d round %d: %v, contents right: %v", w, round, err, bytes.Equal(got, want))
				}
				if _, _, err := f.NextData(off); err != nil {
					t.Errorf("worker %d: next data: %v", w, err)
				}
			}
		})
	}
	all.Wait()
	if size(t, f) != workers*length {
		t.Errorf("length %d, want %d", size(t, f), workers*length)
	}
}
