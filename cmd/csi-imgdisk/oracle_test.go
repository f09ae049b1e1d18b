package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
)

// layout is a kind of image that both qemu-img and we make.
type layout struct {
	format string
	qemu   []string // options for qemu-img convert
	ours   []string // flags for image convert
}

// layouts are at least one per format that qemu-img can create.
var layouts = []layout{
	{"raw", nil, nil},
	{"raw", []string{"-o", "preallocation=full"}, []string{"--preallocation", "full"}},
	{"vmdk", nil, nil},
	{"vmdk", []string{"-o", "subformat=monolithicFlat"}, []string{"--subformat", "monolithicFlat"}},
	{"vmdk", []string{"-o", "subformat=twoGbMaxExtentSparse"}, []string{"--subformat", "twoGbMaxExtentSparse"}},
	{"vmdk", []string{"-o", "subformat=twoGbMaxExtentFlat"}, []string{"--subformat", "twoGbMaxExtentFlat"}},
	{"vmdk", []string{"-o", "subformat=streamOptimized"}, []string{"--subformat", "streamOptimized"}},
	{"vmdk", []string{"-o", "zeroed_grain=on,adapter_type=lsilogic"}, []string{"--option", "zeroed_grain=on", "--option", "adapter_type=lsilogic"}},
	{"vhdx", nil, nil},
	{"vhdx", []string{"-o", "subformat=fixed"}, []string{"--subformat", "fixed"}},
	{"vhdx", []string{"-o", "block_size=1M"}, []string{"--cluster-size", "1M"}},
	{"vhdx", []string{"-o", "block_size=32M"}, []string{"--cluster-size", "32M"}},
	{"vdi", nil, nil},
	{"vdi", []string{"-o", "static=on"}, []string{"--subformat", "static"}},
	{"qcow", nil, nil},
	{"qcow", nil, []string{"--compress"}},
	{"qcow2", nil, nil},
	{"qcow2", []string{"-o", "compat=0.10"}, []string{"--option", "compat=0.10"}},
	{"qcow2", []string{"-c"}, []string{"-c"}},
	{"qcow2", []string{"-c", "-o", "compression_type=zstd"}, []string{"-c", "--option", "compression_type=zstd"}},
	{"qcow2", []string{"-o", "cluster_size=512"}, []string{"--cluster-size", "512"}},
	{"qcow2", []string{"-o", "cluster_size=2M"}, []string{"--cluster-size", "2M"}},
	{"qcow2", []string{"-o", "extended_l2=on,cluster_size=128k"}, []string{"--option", "extended_l2=on", "--cluster-size", "128K"}},
	{"qcow2", []string{"-o", "refcount_bits=1"}, []string{"--option", "refcount_bits=1"}},
	{"qcow2", []string{"-o", "refcount_bits=64,lazy_refcounts=on"}, []string{"--option", "refcount_bits=64", "--option", "lazy_refcounts=on"}},
	{"qcow2", []string{"-o", "preallocation=metadata"}, []string{"--preallocation", "metadata"}},
	{"qcow2", []string{"-o", "preallocation=falloc"}, []string{"--preallocation", "falloc"}},
	{"vpc", nil, nil},
	{"vpc", []string{"-o", "subformat=fixed"}, []string{"--subformat", "fixed"}},
	{"vpc", []string{"-o", "force_size=on"}, nil},
}

func (l layout) String() string { return strings.Join(append([]string{l.format}, l.ours...), " ") }

// eachLayout runs a test for every layout of the registered formats; a short one for the
// first of each.
func eachLayout(t *testing.T, test func(t *testing.T, l layout)) {
	testenv.Oracle(t, "qemu-img")
	all.Register()
	for _, f := range formats.All() {
		made := slices.ContainsFunc(layouts, func(l layout) bool { return l.format == f.Name() })
		if !made {
			t.Errorf("there is no layout of format %s", f.Name())
		}
	}
	for i, l := range layouts {
		if testing.Short() && i > 0 && layouts[i-1].format == l.format {
			continue
		}
		t.Run(l.String(), func(t *testing.T) {
			if _, err := formats.Lookup(l.format); err != nil {
				t.Fatal(err)
			}
			test(t, l)
		})
	}
}

// rawSource makes a sparse file with all kinds of contents, and returns its path.
func rawSource(t *testing.T, size int) string {
	t.Helper()
	r := testenv.Rand(t)
	content := make([]byte, size)
	noise := func(off, n int) {
		for i := off; i < min(off+n, size); i++ {
			content[i] = byte(r.Uint32())
		}
	}
	noise(0, 100_000)
	copy(content[3<<20:], bytes.Repeat([]byte("what can be compressed "), 20_000))
	noise(7<<20+512, 5_000)
	for range 5 {
		noise(r.IntN(size), r.IntN(200_000))
	}
	noise(size-700, 700)
	path := filepath.Join(t.TempDir(), "source.raw")
	writeSparse(t, path, content, r)
	return path
}

// writeSparse leaves out most pages of zeroes.
func writeSparse(t *testing.T, path string, content []byte, r *rand.Rand) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := 0; off < len(content); off += 4096 {
		page := content[off:min(off+4096, len(content))]
		if bytes.Trim(page, "\x00") == nil && r.IntN(20) > 0 {
			continue
		}
		if _, err := f.WriteAt(page, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
}

const oracleSize = 12<<20 + 3*512

// Theirs: we read the same bytes as qemu-img, and our check agrees.
func TestOracle_ReadTheirs(t *testing.T) {
	source := rawSource(t, oracleSize)
	eachLayout(t, func(t *testing.T, l layout) {
		if l.format == "qcow" && len(l.ours) > 0 {
			t.Skip("qemu-img 7.2 fails to compress QCOW")
		}
		image := filepath.Join(t.TempDir(), "theirs.img")
		args := append([]string{"convert", "-f", "raw", "-O", l.format}, l.qemu...)
		tool(t, "qemu-img", append(args, source, image)...)
		ok(t, "image", "compare", "-f", "raw", source, image)
		back := filepath.Join(t.TempDir(), "back.raw")
		ok(t, "image", "convert", image, back)
		sameStart(t, source, back)
		if r := run(t, "image", "check", image); r.code != 0 && r.code != checkUnsupported {
			t.Errorf("check: code %d, %s%s", r.code, r.stdout, r.stderr)
		}
	})
}

// sameStart compares a file with the beginning of one that may be longer by zeroes: some
// formats round sizes up.
func sameStart(t *testing.T, want, got string) {
	t.Helper()
	a, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(got)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(b, a) || bytes.Trim(b[len(a):], "\x00") != nil {
		t.Errorf("%s and %s differ", want, got)
	}
}

// Ours: qemu-img reads the same bytes, and its check finds nothing.
func TestOracle_WriteForThem(t *testing.T) {
	source := rawSource(t, oracleSize)
	eachLayout(t, func(t *testing.T, l layout) {
		image := filepath.Join(t.TempDir(), "ours.img")
		args := append([]string{"image", "convert", "-f", "raw", "-O", l.format}, l.ours...)
		ok(t, append(args, source, image)...)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", l.format, source, image)
		qemu := exec.Command("qemu-img", "check", "-f", l.format, image)
		out, _ := qemu.CombinedOutput() // its exit code is what counts
		if code := qemu.ProcessState.ExitCode(); code != 0 && code != checkUnsupported {
			t.Errorf("qemu-img check: code %d\n%s", code, out)
		}
		ok(t, "image", "compare", "-f", "raw", source, image)
		if r := run(t, "image", "check", image); r.code != 0 && r.code != checkUnsupported {
			t.Errorf("check: code %d, %s%s", r.code, r.stdout, r.stderr)
		}
		if left, err := filepath.Glob(filepath.Join(filepath.Dir(image), ".*")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}

// From every layout to every format: what comes out is what went in.
func TestOracle_BetweenFormats(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	source := rawSource(t, 9<<20)
	sources := map[string]string{}
	eachLayout(t, func(t *testing.T, l layout) {
		if sources[l.format] != "" {
			return
		}
		dir, err := os.MkdirTemp(filepath.Dir(source), l.format)
		if err != nil {
			t.Fatal(err)
		}
		image := filepath.Join(dir, "source.img")
		ok(t, append([]string{"image", "convert", "-f", "raw", "-O", l.format, source, image}, l.ours...)...)
		sources[l.format] = image
	})
	for from, image := range sources {
		for to := range sources {
			t.Run(from+" to "+to, func(t *testing.T) {
				made := filepath.Join(t.TempDir(), "made.img")
				ok(t, "image", "convert", "-f", from, "-O", to, image, made)
				tool(t, "qemu-img", "compare", "-f", "raw", "-F", to, source, made)
			})
		}
	}
}
