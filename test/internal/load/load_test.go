package load

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

const sizeBytes = 11<<20 + 3*BlockBytes + 512

// newFile returns a model of a file full of zeroes, with its workers ready.
func newFile(t *testing.T) (*Model, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, sizeBytes); err != nil {
		t.Fatal(err)
	}
	m := New(sizeBytes, testenv.Rand(t), Options{Workers: 3, ID: 7})
	for _, w := range m.workers {
		w.adopt()
		if err := w.open(path); err != nil {
			t.Skipf("no direct I/O in %s: %v", path, err)
		}
	}
	t.Cleanup(func() { _ = m.closeAll() })
	return m, path
}

func TestWorkersShareTheDevice(t *testing.T) {
	m, _ := newFile(t)
	owners := map[int64]int{}
	for _, w := range m.workers {
		for i := range w.count() {
			owners[w.off(i)]++
		}
	}
	for off := int64(0); off+BlockBytes <= sizeBytes; off += BlockBytes {
		if owners[off] != 1 {
			t.Errorf("block at %d has %d owners", off, owners[off])
		}
	}
	if len(owners) != sizeBytes/BlockBytes {
		t.Errorf("%d blocks are owned, the device has %d", len(owners), sizeBytes/BlockBytes)
	}
}

// write has a worker write blocks.
func write(t *testing.T, w *worker, first, n int) {
	t.Helper()
	if err := w.change(first, n, data); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyFindsWhatDiffers(t *testing.T) {
	for name, spoil := range map[string]func(path string, off int64) error{
		"a bit":        func(path string, off int64) error { return spoil(path, off, func(b []byte) { b[1000] ^= 1 }) },
		"a lost write": func(path string, off int64) error { return spoil(path, off, func(b []byte) { clear(b) }) },
	} {
		t.Run(name, func(t *testing.T) {
			m, path := newFile(t)
			write(t, m.workers[1], 5, 20)
			if err := m.Verify(path); err != nil {
				t.Fatalf("a device as it should be: %v", err)
			}
			if err := spoil(path, m.workers[1].off(9)); err != nil {
				t.Fatal(err)
			}
			if err := m.Verify(path); err == nil || !strings.Contains(err.Error(), "block at") {
				t.Errorf("a spoilt device: %v", err)
			}
		})
	}
}

// spoil changes a block of a file.
func spoil(path string, off int64, change func([]byte)) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, BlockBytes)
	if _, err := f.ReadAt(b, off); err != nil {
		return err
	}
	change(b)
	if _, err := f.WriteAt(b, off); err != nil {
		return err
	}
	return f.Sync()
}

// TestCut: what a snapshot may hold is all that was answered before it began, and what came
// later up to some request, but not a later one without an earlier one.
func TestCut(t *testing.T) {
	// Requests 1 and 2 are before the cut, 3 to 5 during it; each of blocks of its own.
	for name, c := range map[string]struct {
		without []int // requests
		ok      bool
	}{
		"all":                  {nil, true},
		"none of the new":      {[]int{3, 4, 5}, true},
		"up to one":            {[]int{4, 5}, true},
		"a hole":               {[]int{4}, false},
		"without what was old": {[]int{2, 3, 4, 5}, false},
	} {
		t.Run(name, func(t *testing.T) {
			m, path := newFile(t)
			w := m.workers[0]
			write(t, w, 10, 4)
			write(t, w, 20, 4)
			cut := m.BeginCut()
			write(t, w, 30, 4)
			write(t, w, 40, 4)
			write(t, w, 50, 4)
			cut.End()
			write(t, w, 60, 4) // not in the snapshot
			for _, request := range append(c.without, 6) {
				for i := range 4 {
					if err := spoil(path, w.off(10*request+i), func(b []byte) { clear(b) }); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := cut.Verify(path); (err == nil) != c.ok {
				t.Errorf("Verify: %v, want success: %v", err, c.ok)
			}
		})
	}
}
