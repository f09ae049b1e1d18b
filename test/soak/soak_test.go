package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// TestSoak soaks for some seconds, so that the soak itself stays in order and the worst is
// noticed early. `make soak` is what proves something.
func TestSoak(t *testing.T) {
	testenv.Root(t)
	for _, program := range []string{"mkfs.ext4", "mount"} {
		testenv.Oracle(t, program)
	}
	binary := filepath.Join(t.TempDir(), "csi-imgdisk")
	build := exec.Command("go", "build", "-o", binary, "github.com/csi-imgdisk/csi-imgdisk/cmd/csi-imgdisk")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	c := config{duration: 15 * time.Second, volumes: 3, binary: binary, dir: t.TempDir(), out: t.Output()}
	if testing.Short() {
		c.duration = 5 * time.Second
	}
	var err error
	if c.seed, err = seed(); err != nil {
		t.Fatal(err)
	}
	err = run(t.Context(), c)
	if err != nil && strings.Contains(err.Error(), "no transport works here") && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestInterrupt: an interrupted soak leaves nothing, and says that it was interrupted.
func TestInterrupt(t *testing.T) {
	testenv.Root(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	err := run(ctx, config{duration: time.Minute, volumes: 1, binary: "/nonexistent", dir: dir, out: t.Output()})
	if err == nil {
		t.Error("an interrupted soak succeeded")
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestSplit(t *testing.T) {
	if got := split(""); got != nil {
		t.Errorf("nothing is %q", got)
	}
	if got := split("raw,vmdk"); len(got) != 2 || got[1] != "vmdk" {
		t.Errorf("two are %q", got)
	}
}
