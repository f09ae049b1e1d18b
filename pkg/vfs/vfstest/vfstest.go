// Package vfstest is the conformance suite for implementations of [vfs.FS]: what package
// vfs documents, as tests. An implementation's own test is
//
//	vfstest.Run(t, func(tb testing.TB) vfs.FS { return newEmptyFS(tb) })
package vfstest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Run tests the file system that newFS makes: empty, writable, with at least 16 MiB of
// space. Operations it does not support (errors.ErrUnsupported) are skipped.
func Run(t *testing.T, newFS func(testing.TB) vfs.FS) {
	for _, c := range []struct {
		name string
		test func(*testing.T, vfs.FS)
	}{
		{"ReadWrite", testReadWrite},
		{"TwoOpens", testTwoOpens},
		{"OpenCreate", testOpenCreate},
		{"ReadOnly", testReadOnly},
		{"Truncate", testTruncate},
		{"Allocate", testAllocate},
		{"PunchHole", testPunchHole},
		{"NextData", testNextData},
		{"BadRanges", testBadRanges},
		{"BadNames", testBadNames},
		{"Directories", testDirectories},
		{"Rename", testRename},
		{"RenameRefused", testRenameRefused},
		{"RemoveOpen", testRemoveOpen},
		{"Stat", testStat},
		{"Usage", testUsage},
		{"Closed", testClosed},
		{"Locks", testLocks},
		{"LockChange", testLockChange},
		{"Model", testModel},
		{"Concurrent", testConcurrent},
	} {
		t.Run(c.name, func(t *testing.T) {
			fsys := newFS(t)
			c.test(t, fsys)
			if err := fsys.Close(); err != nil {
				t.Errorf("close the file system: %v", err)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// supported skips the test when the file system cannot do what gave err.
func supported(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	must(t, err)
}

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// create makes a file with contents. It is closed at the end of the test.
func create(t *testing.T, fsys vfs.FS, name string, contents []byte) vfs.File {
	t.Helper()
	f, err := fsys.Create(name)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	if len(contents) > 0 {
		write(t, f, contents, 0)
	}
	return f
}

func open(t *testing.T, fsys vfs.FS, name string, mode vfs.Mode) vfs.File {
	t.Helper()
	f, err := fsys.Open(name, mode)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func write(t *testing.T, f vfs.File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

func size(t *testing.T, f vfs.File) int64 {
	t.Helper()
	n, err := f.Size()
	must(t, err)
	return n
}

func allocated(t *testing.T, f vfs.File) int64 {
	t.Helper()
	n, err := f.AllocatedBytes()
	must(t, err)
	return n
}

// contents reads a whole file.
func contents(t *testing.T, f vfs.File) []byte {
	t.Helper()
	p := pattern('?', int(size(t, f)))
	if n, err := f.ReadAt(p, 0); n != len(p) || err != nil && err != io.EOF {
		t.Fatalf("read all %d bytes: %d, %v", len(p), n, err)
	}
	return p
}

func wantContents(t *testing.T, f vfs.File, want []byte) {
	t.Helper()
	got := contents(t, f)
	if len(got) != len(want) {
		t.Fatalf("length %d, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
		}
	}
}

func pattern(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func wantNames(t *testing.T, fsys vfs.FS, dir string, want ...string) {
	t.Helper()
	entries, err := fsys.ReadDir(dir)
	must(t, err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if len(got) != len(want) {
		t.Fatalf("%s holds %q, want %q", dir, got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s holds %q, want %q", dir, got, want)
		}
	}
}

func wantMissing(t *testing.T, fsys vfs.FS, name string) {
	t.Helper()
	_, err := fsys.Stat(name)
	wantErr(t, "stat "+name, err, fs.ErrNotExist)
}
