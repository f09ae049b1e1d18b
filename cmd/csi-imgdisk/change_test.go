package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
)

// overlayFormats are the formats whose images can stand on others of their own.
func overlayFormats() (names []string) {
	all.Register()
	for _, f := range formats.All() {
		if slices.Contains(f.Options().ParentFormats, f.Name()) {
			names = append(names, f.Name())
		}
	}
	return names
}

// disk converts a raw source that reads as content from some offset on.
func disk(t *testing.T, dir, name, format string, content []byte, args ...string) string {
	t.Helper()
	source, image := filepath.Join(dir, name+".source"), filepath.Join(dir, name)
	writeFile(t, source, content)
	ok(t, append([]string{"image", "convert", "-f", "raw", "-O", format, source, image}, args...)...)
	return image
}

// reads checks what an image reads as.
func reads(t *testing.T, image, format string, want []byte) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	ok(t, "image", "convert", "-f", format, "-O", "raw", image, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s reads differently", image)
	}
}

const changeSize = 4 << 20

// baseAndOver returns a base's contents, and an overlay's on it.
func baseAndOver() (base, overlay []byte) {
	base = make([]byte, changeSize)
	copy(base[1<<20:], bytes.Repeat([]byte("base "), 100_000))
	overlay = bytes.Clone(base)
	copy(overlay[1<<20+5000:], bytes.Repeat([]byte("over "), 50_000))
	clear(overlay[1<<20+400_000 : 1<<20+450_000])
	return base, overlay
}

// A copy onto a parent holds only what differs, and reads the same; it can be committed,
// rebased and flattened.
func TestOverlay_Life(t *testing.T) {
	base, over := baseAndOver()
	for _, format := range overlayFormats() {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			a := disk(t, dir, "a", format, base)
			b := disk(t, dir, "b", format, over, "--parent", a)
			reads(t, b, format, over)
			info := decode[imageInfo](t, ok(t, "image", "info", "-o", "json", "-f", format, b))
			if info.BackingFilename != "a" {
				t.Errorf("it stands on %q", info.BackingFilename)
			}
			c := disk(t, dir, "c", format, base[:changeSize/2])
			ok(t, "image", "rebase", "-f", format, "--parent", c, "-F", format, b)
			reads(t, b, format, over)
			ok(t, "image", "rebase", "-f", format, "--backing", a, b)
			ok(t, "image", "commit", "-f", format, b)
			reads(t, a, format, over)
			reads(t, b, format, over)
			ok(t, "image", "rebase", "-f", format, "--flatten", b)
			if err := os.Remove(a); err != nil {
				t.Fatal(err)
			}
			reads(t, b, format, over)
			if r := run(t, "image", "check", "-f", format, b); r.code != 0 && r.code != checkLeaks {
				t.Errorf("check: code %d, %s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
}

// A snapshot is an overlay, which goes on where the image was.
func TestSnapshot(t *testing.T) {
	base, _ := baseAndOver()
	dir := t.TempDir()
	a := disk(t, dir, "a.qcow2", "qcow2", base)
	b := filepath.Join(dir, "b.qcow2")
	ok(t, "image", "snapshot", a, b)
	reads(t, b, "qcow2", base)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"image", "snapshot", "-c", "monday", a}, "snapshot " + a + " OVERLAY"},
		{[]string{"image", "snapshot", a, b}, "exists"},
		{[]string{"image", "snapshot", a}, "--list"},
		{[]string{"image", "rebase", b}, "--flatten"},
		{[]string{"image", "rebase", b, "--flatten", "--parent", a}, "--flatten"},
		{[]string{"image", "rebase", a, "--parent", b}, "stands on itself"},
		{[]string{"image", "commit", a}, "stands on nothing"},
		{[]string{"image", "commit", "--base", a, a}, "does not stand on"},
		{[]string{"image", "convert", "--from-chain", "-B", a, b, filepath.Join(dir, "c.qcow2")}, "--parent"},
		{[]string{"image", "convert", "-c", a, filepath.Join(dir, "c.vdi")}, "holds no compressed data"},
		{[]string{"image", "resize", a, "-1T"}, "nothing would be left"},
		{[]string{"image", "resize", a, "--", "+-1"}, "after + or -"},
		{[]string{"image", "measure"}, "--size"},
	} {
		r := run(t, c.args...)
		if r.code != 1 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, c.want) {
			t.Errorf("%v: exit code %d, want 1 and one sentence with %q:\n%s", c.args, r.code, c.want, r.stderr)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Other programs follow our links to parents of other formats.
func TestCreate_OnAnotherFormat(t *testing.T) {
	testenv.Oracle(t, "qemu-img")
	all.Register()
	base, _ := baseAndOver()
	f, err := formats.Lookup("qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range f.Options().ParentFormats {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			a := disk(t, dir, "a.img", format, base)
			b := filepath.Join(dir, "b.qcow2")
			ok(t, "image", "create", "-b", a, "-F", format, b)
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", filepath.Join(dir, "a.img.source"), b)
			reads(t, b, "qcow2", base)
		})
	}
}

// A guest can write any header into a raw disk: where an overlay does not say the format of
// its parent, a person can.
func TestConvert_ChainFormat(t *testing.T) {
	dir := t.TempDir()
	forged := filepath.Join(dir, "forged.vmdk")
	ok(t, "image", "create", forged, "1M")
	base, err := os.ReadFile(forged)
	if err != nil {
		t.Fatal(err)
	}
	base = append(base, make([]byte, changeSize-len(base))...)
	writeFile(t, filepath.Join(dir, "base"), base)
	over := filepath.Join(dir, "over.qcow")
	ok(t, "image", "create", "-f", "qcow", "-b", filepath.Join(dir, "base"), "-F", "raw", over)
	out := filepath.Join(dir, "out.raw")
	ok(t, "image", "convert", "--chain-format", "raw", over, out)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, base) {
		t.Error("the raw parent was taken for something else")
	}
	ok(t, "image", "compare", "--chain-format", "raw", "-F", "raw", over, filepath.Join(dir, "base"))
}

func TestResize_BothWays(t *testing.T) {
	base, _ := baseAndOver()
	all.Register()
	for _, f := range formats.All() {
		t.Run(f.Name(), func(t *testing.T) {
			format, want := f.Name(), base
			a := disk(t, t.TempDir(), "a", format, base)
			for _, step := range []struct {
				args []string
				size int
			}{
				{[]string{"+4M"}, 2 * changeSize},
				{[]string{"-2M"}, 2*changeSize - 2<<20},
				{[]string{"4M"}, changeSize},
				{[]string{"--shrink", "1536K"}, 3 << 19},
				{[]string{"2M"}, 2 << 20},
			} {
				ok(t, append([]string{"image", "resize", "-f", format, a}, step.args...)...)
				if step.size <= len(want) {
					want = bytes.Clone(want[:step.size])
				} else {
					want = append(bytes.Clone(want), make([]byte, step.size-len(want))...)
				}
				reads(t, a, format, want)
			}
			if r := run(t, "image", "resize", "-f", format, a, "-1M"); r.code != 1 || !strings.Contains(r.stderr, "--shrink") {
				t.Errorf("shrink over data: code %d, %s", r.code, r.stderr)
			}
		})
	}
}

// An interrupted conversion leaves nothing, and says so.
func TestConvert_Interrupted(t *testing.T) {
	dir := t.TempDir()
	r := testenv.Rand(t)
	noise := make([]byte, 96<<20)
	for i := 0; i < len(noise); i += 8 {
		copy(noise[i:], bytes.Repeat([]byte{byte(r.Uint32())}, 1+r.IntN(8)))
	}
	source := filepath.Join(dir, "source.raw")
	writeFile(t, source, noise)
	for _, subformat := range []string{"streamOptimized", "monolithicFlat"} {
		target := filepath.Join(dir, "target.vmdk")
		cmd := exec.Command(binary, "image", "convert", "-f", "raw", "--subformat", subformat, source, target)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool {
			partial, err := filepath.Glob(filepath.Join(dir, ".target*.partial"))
			return err == nil && len(partial) > 0
		})
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil || !strings.Contains(stderr.String(), "interrupted") {
			t.Errorf("%s: %v, %s", subformat, err, stderr.String())
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("%s: left %v, %v", subformat, entries, err)
		}
	}
}

func waitFor(t *testing.T, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited for a minute in vain")
		}
	}
}

func TestConvert_Force(t *testing.T) {
	base, over := baseAndOver()
	dir := t.TempDir()
	a := disk(t, dir, "a.vmdk", "vmdk", base)
	b := disk(t, dir, "b.vmdk", "vmdk", over)
	if r := run(t, "image", "convert", "--force", a, a); r.code != 1 || !strings.Contains(r.stderr, "in use") {
		t.Errorf("onto itself: code %d, %s", r.code, r.stderr)
	}
	ok(t, "image", "convert", "--force", a, b)
	reads(t, b, "vmdk", base)
}

// Passwords come from files; with another one, the contents are others.
func TestConvert_Encrypted(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	base, _ := baseAndOver()
	dir := t.TempDir()
	password, plain := filepath.Join(dir, "password"), filepath.Join(dir, "plain.raw")
	writeFile(t, password, []byte("correct horse\n"))
	writeFile(t, filepath.Join(dir, "exact"), []byte("correct horse"))
	writeFile(t, plain, base)
	theirs := filepath.Join(dir, "theirs.qcow")
	tool(t, qemuImg, "convert", "-f", "raw", "-O", "qcow", "--object", "secret,id=s,file="+filepath.Join(dir, "exact"),
		"-o", "encrypt.format=aes,encrypt.key-secret=s", plain, theirs)
	back := filepath.Join(dir, "back.raw")
	ok(t, "image", "convert", "--secret-file", password, theirs, back)
	sameStart(t, plain, back)
	if r := run(t, "image", "convert", theirs, filepath.Join(dir, "none.raw")); r.code != 1 || !strings.Contains(r.stderr, "--secret-file") {
		t.Errorf("without a password: code %d, %s", r.code, r.stderr)
	}
	info := decode[imageInfo](t, ok(t, "image", "info", "-o", "json", theirs))
	if !info.Encrypted {
		t.Errorf("info: %+v", info)
	}
}
