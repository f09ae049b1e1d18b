package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// Devices that are compared with ours show the image, and leave nothing behind.
func TestMakeDevice(t *testing.T) {
	testenv.Root(t)
	testenv.Oracle(t, qemuStorageDaemon)
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<20/16)
	for _, name := range []string{plainLoop, qemuStorageDaemon} {
		b := &bench{dir: t.TempDir()}
		image := filepath.Join(b.dir, "x.raw")
		if err := os.WriteFile(image, content, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := b.makeDevice(name, rawName, "x.raw")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, err := os.ReadFile(d.path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %s has %d bytes, others than the image: %v", name, d.path, len(got), err)
		}
		if err := d.remove(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join("/sys/block", filepath.Base(d.path), "loop/backing_file")); err == nil {
			t.Errorf("%s: %s is still bound", name, d.path)
		}
		if mounted, err := isMounted(filepath.Join(b.dir, "export")); mounted || err != nil {
			t.Errorf("%s: its file is still mounted: %v", name, err)
		}
	}
}

// What cannot be exported is an error, and leaves nothing behind either.
func TestMakeDevice_NoImage(t *testing.T) {
	testenv.Root(t)
	testenv.Oracle(t, qemuStorageDaemon)
	b := &bench{dir: t.TempDir()}
	for _, name := range []string{plainLoop, qemuStorageDaemon, "nobody"} {
		if _, err := b.makeDevice(name, rawName, "none.raw"); err == nil {
			t.Errorf("%s makes a device of nothing", name)
		}
	}
	if mounted, err := isMounted(filepath.Join(b.dir, "export")); mounted || err != nil {
		t.Errorf("a file is mounted: %v", err)
	}
}
