package main

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// sample is a real image by another program, as the samples' table describes it.
type sample struct {
	file   string // without the ending of a compressed one
	size   int64
	expect string
	digest string // of the guest's blocks that are not zero: see guestDigest
}

// Real images by other people's programs, found out by their contents, have the size and
// contents that they are known to have, and what is no image alone is refused.
func TestTheirs_Samples(t *testing.T) {
	from := testenv.Samples(t)
	d := newWorkDir(t)
	for _, s := range unpackSamples(t, from, d) {
		t.Run(s.file, func(t *testing.T) {
			img, err := formats.Open(context.Background(), d.fs, s.file, formats.OpenOptions{})
			if s.expect == "refuse" {
				if err == nil {
					img.Close()
					t.Error("it is opened, want a refusal")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if got := img.Info().SizeBytes; got != s.size {
				t.Errorf("it has %d bytes, want %d", got, s.size)
			}
			if got := guestDigest(t, img); got != s.digest {
				t.Errorf("its contents have the digest %s, want %s", got, s.digest)
			}
			top := img.Layers()[0]
			format, err := formats.Lookup(top.Format)
			if err != nil {
				t.Fatal(err)
			}
			kind{format, top.Codec.Describe().Subformat}.figures().ReadTheirs.Add(1)
		})
	}
}

// unpackSamples puts samples into a directory, those that belong together beside one
// another, and returns them as the table describes them.
func unpackSamples(t *testing.T, from string, to workDir) []sample {
	t.Helper()
	table, err := os.ReadFile(filepath.Join(from, "SAMPLES.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	var samples []sample
	for _, line := range strings.Split(strings.TrimSpace(string(table)), "\n")[1:] {
		f := strings.Split(line, "\t")
		if len(f) < 8 {
			t.Fatalf("SAMPLES.tsv: %d fields, want at least 8: %s", len(f), line)
		}
		if _, err := os.Stat(filepath.Join(from, f[0])); err != nil {
			continue
		}
		s := sample{file: unpackSample(t, from, f[0], to), expect: f[5], digest: f[7]}
		if f[4] != "" {
			if s.size, err = strconv.ParseInt(f[4], 10, 64); err != nil {
				t.Fatalf("SAMPLES.tsv: %s: %v", f[0], err)
			}
		}
		samples = append(samples, s)
	}
	return samples
}

// unpackSample unpacks a file, and returns what it is called then.
func unpackSample(t *testing.T, from, file string, to workDir) string {
	t.Helper()
	packed, err := os.ReadFile(filepath.Join(from, file))
	if err != nil {
		t.Fatal(err)
	}
	var plain io.Reader = bytes.NewReader(packed)
	name := strings.TrimSuffix(file, path.Ext(file))
	switch path.Ext(file) {
	case ".gz":
		plain, err = gzip.NewReader(plain)
	case ".bz2":
		plain = bzip2.NewReader(plain)
	case ".xz":
		var out []byte
		out, err = exec.Command(testenv.Oracle(t, "xz"), "-dc", filepath.Join(from, file)).Output()
		plain = bytes.NewReader(out)
	default:
		name = file
	}
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to.join(name)), 0o700)
	}
	if err != nil {
		t.Fatalf("unpack %s: %v", file, err)
	}
	f, err := os.Create(to.join(name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, plain); err != nil {
		t.Fatalf("unpack %s: %v", file, err)
	}
	return name
}

// guestDigest returns the SHA-256 of the blocks of 64 KiB that are not all zero, each
// after its guest offset, the last one padded.
func guestDigest(t *testing.T, d block.Device) string {
	t.Helper()
	const blockBytes = 64 << 10
	h := sha256.New()
	size := d.Info().SizeBytes
	for off := int64(0); off < size; {
		e, err := d.Map(off, size-off)
		if err != nil {
			t.Fatal(err)
		}
		if skip := (off+e.Len)/blockBytes*blockBytes - off; e.State != block.Data && skip > 0 && off%blockBytes == 0 {
			off += skip
			continue
		}
		p := make([]byte, blockBytes)
		if _, err := d.ReadAt(p[:min(blockBytes, size-off)], off); err != nil {
			t.Fatal(err)
		}
		if len(bytes.Trim(p, "\x00")) > 0 {
			h.Write(binary.BigEndian.AppendUint64(nil, uint64(off)))
			h.Write(p)
		}
		off += blockBytes
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}
