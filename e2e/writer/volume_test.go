package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// start makes a writer on a file in a directory that can do direct I/O.
func start(t *testing.T, path string, run, flushed uint64) (*volume, error) {
	t.Helper()
	w, err := open(config{path: path, blocks: 64, run: run, flushed: flushed, batch: 8, every: time.Hour})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = w.file.Close() })
	return w, w.readAll(w.adopt)
}

func written(t *testing.T) (path string, w *volume) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "volume")
	w, err := start(t, path, 1, 0)
	if err != nil {
		t.Skipf("no direct I/O in the temporary directory? %v", err)
	}
	for range 20 { // two and a half passes
		if err := w.round(); err != nil {
			t.Fatal(err)
		}
	}
	return path, w
}

func TestSecondRun(t *testing.T) {
	path, w := written(t)
	if err := w.readAll(w.compare); err != nil {
		t.Fatal(err)
	}
	second, err := start(t, path, 2, w.flushed)
	if err != nil {
		t.Fatal(err)
	}
	if second.found != 64 || second.next != w.next {
		t.Errorf("found %d blocks, next is %d; want 64, %d", second.found, second.next, w.next)
	}
	if err := second.round(); err != nil {
		t.Fatal(err)
	}
	// The first run does not write here any more, and would notice the second.
	if err := w.readAll(w.compare); !errors.Is(err, errWrong) {
		t.Errorf("another's writes: %v", err)
	}
}

func TestUnflushedMayBeThere(t *testing.T) {
	path, w := written(t)
	if _, err := start(t, path, 2, w.flushed-13); err != nil {
		t.Fatal(err)
	}
}

// A crash may keep later writes and lose earlier ones, if none was flushed. What a third run is
// told then is true: the second has flushed everything.
func TestUnflushedMayBeMissing(t *testing.T) {
	path, w := written(t)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flushed := w.flushed - 13
	for s := flushed + 1; s <= flushed+9; s++ {
		before := make([]byte, blockBytes)
		encode(before, header{1, s - w.blocks})
		if _, err := f.WriteAt(before, int64(w.place(s))*blockBytes); err != nil {
			t.Fatal(err)
		}
	}
	second, err := start(t, path, 2, flushed)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(second.fillGaps(), second.round()); err != nil {
		t.Fatal(err)
	}
	if _, err := start(t, path, 3, second.flushed); err != nil {
		t.Error(err)
	}
}

func TestLost(t *testing.T) {
	path, w := written(t)
	_, err := start(t, path, 2, w.flushed+5)
	if !errors.Is(err, errWrong) || !strings.Contains(err.Error(), "lost") {
		t.Errorf("five blocks that are not there: %v", err)
	}
}

func TestCorrupt(t *testing.T) {
	for name, damage := range map[string]func(b []byte) []byte{
		"one bit":       func(b []byte) []byte { b[5*blockBytes+3000] ^= 1; return b },
		"half a block":  func(b []byte) []byte { copy(b[5*blockBytes+2048:], make([]byte, 2048)); return b },
		"old block":     func(b []byte) []byte { encode(b[5*blockBytes:], header{1, 0}); return b },
		"another place": func(b []byte) []byte { copy(b[5*blockBytes:6*blockBytes], b[6*blockBytes:]); return b },
		"zeroed":        func(b []byte) []byte { clear(b[5*blockBytes : 6*blockBytes]); return b },
		"shorter file":  func(b []byte) []byte { return b[:63*blockBytes] },
	} {
		path, w := written(t)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, damage(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := start(t, path, 2, w.flushed); !errors.Is(err, errWrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
