package qcow_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// TestSamples reads images by other people's tools, writes to them, resizes them, and has QEMU
// judge.
func TestSamples(t *testing.T) {
	dir := testenv.Samples(t)
	table, err := os.ReadFile(filepath.Join(dir, "SAMPLES.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, line := range strings.Split(string(table), "\n") {
		f := strings.Split(line, "\t")
		if len(f) < 7 || !strings.HasPrefix(f[3], "qcow v1") {
			continue
		}
		found++
		t.Run(f[0], func(t *testing.T) { useSample(t, filepath.Join(dir, f[0]), f[4], f[6]) })
	}
	if found == 0 {
		t.Error("there is no sample of QCOW version 1")
	}
}

func useSample(t *testing.T, file, size, sum string) {
	data, err := os.ReadFile(file)
	if err == nil && strings.HasSuffix(file, ".xz") {
		data, err = exec.Command(testenv.Oracle(t, "xz"), "-dc", file).Output()
	}
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	writeFile(t, to, "a.qcow", data)
	image := mustOpen(t, inDir(t, to), "a.qcow", vfs.ReadOnly)
	disk := readGuest(t, image)
	if got := fmt.Sprint(len(disk)); got != size {
		t.Errorf("size %s, want %s", got, size)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(disk)); got != sum {
		t.Errorf("contents have SHA-256 %s, want %s", got, sum)
	}
	checkClean(t, image)
	compareInfo(t, to, "a.qcow", image)
	mustClose(t, image)

	r := testenv.Rand(t)
	image = mustOpen(t, inDir(t, to), "a.qcow", vfs.ReadWrite)
	scribble(t, r, image, disk, 20)
	disk = resizeRandomly(t, r, image, disk)
	scribble(t, r, image, disk, 10)
	closeAndJudge(t, to, "a.qcow", image, disk)
}
