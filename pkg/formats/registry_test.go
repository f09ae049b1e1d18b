package formats_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestLookup(t *testing.T) {
	for name, want := range map[string]string{"raw": "raw", "img": "raw", "dd": "raw", "vmdk": "vmdk"} {
		if f, err := formats.Lookup(name); err != nil || f.Name() != want {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
	for _, name := range []string{"", "what", "RAW"} {
		if _, err := formats.Lookup(name); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "raw (dd, img)") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// Every format's images are known by their contents, whatever they are called.
func TestProbe(t *testing.T) {
	for _, f := range formats.All() {
		if f.Name() == "tailed" {
			continue // see TestProbe_ByTheEnd
		}
		for _, subformat := range append(f.Options().Subformats, "") {
			if strings.HasSuffix(subformat, "Flat") || subformat == "vmfs" {
				continue // the descriptor needs another name
			}
			mem := vfs.NewMem()
			req := formats.CreateRequest{FS: mem, Name: "image.vmdk", SizeBytes: 8 << 20, Subformat: subformat}
			if err := f.Create(context.Background(), req); err != nil {
				t.Errorf("%s %s: %v", f.Name(), subformat, err)
				continue
			}
			if found, err := formats.Probe(mem, "image.vmdk"); err != nil || found.Name() != f.Name() {
				t.Errorf("%s %s: probed %v, %v", f.Name(), subformat, found, err)
			}
		}
	}
}

// tailed is a format that only a file's end tells.
type tailed struct{ raw.Format }

func (tailed) Name() string             { return "tailed" }
func (tailed) Probe([]byte, int64) bool { return false }
func (tailed) ProbeTail(tail []byte, size int64) bool {
	return bytes.HasSuffix(tail, []byte("the end")) && size > 7
}

func TestProbe_ByTheEnd(t *testing.T) {
	if _, err := formats.Lookup("tailed"); err != nil {
		formats.Register(tailed{})
	}
	mem := vfs.NewMem()
	for name, c := range map[string]struct{ content, want string }{
		"empty":     {"", "raw"},
		"only":      {"the end", "raw"},
		"by end":    {strings.Repeat("x", 5000) + "the end", "tailed"},
		"not quite": {strings.Repeat("x", 5000) + "the end.", "raw"},
	} {
		createFile(t, mem, name, c.content)
		if f, err := formats.Probe(mem, name); err != nil || f.Name() != c.want {
			t.Errorf("%s: %v, %v, want %s", name, f, err, c.want)
		}
	}
	createFile(t, mem, "both", "# Disk DescriptorFile\nversion=1\n"+strings.Repeat("#\n", 300)+"the end")
	if _, err := formats.Probe(mem, "both"); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "vmdk, tailed") {
		t.Errorf("what looks like two formats: %v", err)
	}
}
