package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// TestUpgrade_AttachedImage: another program takes an image over, with what was written and
// not flushed, while its device stays open.
func TestUpgrade_AttachedImage(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	image, runDir := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "run")
	if out := ok(t, "upgrade", "--run-dir", runDir); out != "" {
		t.Errorf("with nothing attached: %s", out)
	}
	ok(t, "image", "create", image, "64M")
	before := attachedDevice(t, image, runDir)
	f, err := os.OpenFile(before.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte("imgdisk "), 1<<20/8)
	if _, err := f.WriteAt(want, 3<<20); err != nil {
		t.Fatal(err)
	}

	other := filepath.Join(dir, "csi-imgdisk")
	tool(t, "cp", binary, other) // a file of its own is another program
	upgraded := func() supervisor.UpgradeResult {
		t.Helper()
		results := decode[[]supervisor.UpgradeResult](t, tool(t, other, "upgrade", "--run-dir", runDir, "-o", "json"))
		if len(results) != 1 || results[0].Problem != "" || !strings.HasSuffix(results[0].ID, image) {
			t.Fatalf("upgraded: %+v", results)
		}
		return results[0]
	}
	if !upgraded().Replaced {
		t.Error("the server is the same")
	}
	if upgraded().Replaced {
		t.Error("the server was replaced by one of the same program")
	}
	if out := tool(t, other, "upgrade", "--run-dir", runDir); out != image+": unknown already\n" {
		t.Errorf("in words: %s", out)
	}
	list := decode[[]deviceInfo](t, ok(t, "devices", "--run-dir", runDir, "-o", "json"))
	if len(list) != 1 || list[0].PID == before.PID || list[0].Device != before.Device || list[0].Restarts != 0 {
		t.Errorf("after the upgrade: %+v, was %+v", list, before)
	}
	if err := f.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 3<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device does not hold what was written before the upgrade: %v", err)
	}
	f.Close()
	detachWhenIdle(t, before.Device, runDir)
	ok(t, "image", "check", image)
	raw := filepath.Join(dir, "x.raw")
	ok(t, "image", "convert", image, raw)
	content, err := os.ReadFile(raw)
	if err != nil || !bytes.Equal(content[3<<20:][:len(want)], want) {
		t.Errorf("the image does not hold what was written to the device: %v", err)
	}
}
