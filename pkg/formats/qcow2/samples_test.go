package qcow2_test

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Images that other people's tools made read as what they are known to hold.
func TestSamples(t *testing.T) {
	samples := testenv.Samples(t)
	table, err := os.ReadFile(filepath.Join(samples, "SAMPLES.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, line := range strings.Split(string(table), "\n") {
		f := strings.Split(line, "\t")
		if len(f) < 7 || !strings.HasPrefix(f[3], "qcow2 ") || f[5] != "content" {
			continue
		}
		found++
		t.Run(f[0], func(t *testing.T) {
			dir, name := filepath.Join(samples, filepath.Dir(f[0])), filepath.Base(f[0])
			image := mustOpen(t, dir, name, vfs.ReadOnly)
			defer image.Close()
			if size, err := strconv.ParseInt(f[4], 10, 64); err != nil || image.Info().SizeBytes != size {
				t.Errorf("it has %d bytes, want %s", image.Info().SizeBytes, f[4])
			}
			if got := digest(t, image); got != f[6] {
				t.Errorf("its contents have the SHA-256 %s, want %s", got, f[6])
			}
			if result := checkWith(t, dir, name, false); result.Corruptions > 0 {
				t.Errorf("check: %+v", result)
			}
		})
	}
	if found == 0 {
		t.Error("no samples of QCOW2")
	}
}

func digest(t *testing.T, image *formats.Image) string {
	t.Helper()
	sum := sha256.New()
	if _, err := io.CopyBuffer(sum, io.NewSectionReader(image, 0, image.Info().SizeBytes), make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}
