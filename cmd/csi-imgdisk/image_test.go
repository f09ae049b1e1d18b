package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// chain makes an image and an overlay on it with qemu-img, and returns their paths.
func chain(t *testing.T) (base, overlay string) {
	t.Helper()
	qemuImg, qemuIO := testenv.Oracle(t, "qemu-img"), testenv.Oracle(t, "qemu-io")
	dir := t.TempDir()
	base, overlay = filepath.Join(dir, "base.vmdk"), filepath.Join(dir, "overlay.vmdk")
	tool(t, qemuImg, "create", "-q", "-f", "vmdk", base, "20M")
	tool(t, qemuIO, "-c", "write -P 1 1M 1M", "-c", "write -P 2 7M 300k", base)
	tool(t, qemuImg, "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", overlay)
	tool(t, qemuIO, "-c", "write -P 3 1536k 1M", overlay)
	return base, overlay
}

// sameFields compares the fields of two JSON objects that qemu-img has.
func sameFields(t *testing.T, what string, got, want map[string]any, except ...string) {
	t.Helper()
	for name, value := range want {
		skip := false
		for _, e := range except {
			skip = skip || e == name
		}
		if diff := cmp.Diff(value, got[name]); diff != "" && !skip {
			t.Errorf("%s: field %s differs from qemu-img's (-want +got):\n%s", what, name, diff)
		}
	}
}

func TestInfo_HasQEMUsFields(t *testing.T) {
	_, overlay := chain(t)
	want := decode[map[string]any](t, tool(t, "qemu-img", "info", "--output=json", overlay))
	got := decode[map[string]any](t, ok(t, "image", "info", "-o", "json", overlay))
	// Names of backing files: qemu-img joins them with the path it was given.
	sameFields(t, "info", got, want, "format-specific")
	sameFields(t, "format-specific", specific(got), specific(want), "extents")
}

func specific(info map[string]any) map[string]any {
	return info["format-specific"].(map[string]any)["data"].(map[string]any)
}

func TestInfo_WhileAnotherProcessWrites(t *testing.T) {
	base, _ := chain(t)
	cmd := exec.Command(testenv.Oracle(t, "qemu-io"), base)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	if _, err := stdin.Write([]byte("write -P 9 0 64k\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 256)); err != nil { // it has the image open
		t.Fatal(err)
	}
	ok(t, "image", "info", base)
	if r := run(t, "image", "check", base); r.code != checkFailed || !strings.Contains(r.stderr, "in use by another process") {
		t.Errorf("check of an image in use: code %d, %s", r.code, r.stderr)
	}
	ok(t, "image", "map", "--force-share", base)
}

func TestMap_HasQEMUsFields(t *testing.T) {
	for _, path := range func() []string { a, b := chain(t); return []string{a, b} }() {
		want := decode[[]map[string]any](t, tool(t, "qemu-img", "map", "--output=json", path))
		got := decode[[]map[string]any](t, ok(t, "image", "map", "-o", "json", path))
		if len(got) != len(want) {
			t.Fatalf("%d extents, qemu-img has %d: %v", len(got), len(want), got)
		}
		for i := range want {
			sameFields(t, "map", got[i], want[i])
		}
	}
}

func TestCheck_HasQEMUsFieldsAndCodes(t *testing.T) {
	base, overlay := chain(t)
	for _, path := range []string{base, overlay} {
		want := decode[map[string]any](t, tool(t, "qemu-img", "check", "--output=json", path))
		got := decode[map[string]any](t, ok(t, "image", "check", "-o", "json", path))
		sameFields(t, "check", got, want)
	}
	raw := filepath.Join(t.TempDir(), "a.raw")
	writeFile(t, raw, make([]byte, 1<<20))
	if r := run(t, "image", "check", raw); r.code != checkUnsupported {
		t.Errorf("check of a raw image: code %d, want %d: %s", r.code, checkUnsupported, r.stderr)
	}
	image, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, base, image[:len(image)-200<<10]) // the last grains are gone
	if r := run(t, "image", "check", base); r.code != checkCorrupt {
		t.Errorf("check of a truncated image: code %d, want %d: %s%s", r.code, checkCorrupt, r.stdout, r.stderr)
	}
}

func TestCompare_HasQEMUsCodes(t *testing.T) {
	base, overlay := chain(t)
	missing := filepath.Join(t.TempDir(), "missing.vmdk")
	for _, c := range []struct {
		name string
		args []string
	}{
		{"identical", []string{base, base}},
		{"different", []string{base, overlay}},
		{"missing", []string{base, missing}},
	} {
		qemu := exec.Command("qemu-img", append([]string{"compare"}, c.args...)...)
		_ = qemu.Run() // its exit code is what counts
		r := run(t, append([]string{"image", "compare", "-o", "json"}, c.args...)...)
		if want := qemu.ProcessState.ExitCode(); r.code != want {
			t.Errorf("%s: exit code %d, qemu-img's is %d: %s", c.name, r.code, want, r.stderr)
		}
	}
	d := decode[comparison](t, run(t, "image", "compare", "-o", "json", base, overlay).stdout)
	if d.Identical || d.Offset == nil || *d.Offset != 1536<<10 {
		t.Errorf("first difference: %+v, want at %d", d, 1536<<10)
	}
}

func TestConvert_ToAndFro(t *testing.T) {
	_, overlay := chain(t)
	dir := t.TempDir()
	stream, raw, back := filepath.Join(dir, "stream.vmdk"), filepath.Join(dir, "a.raw"), filepath.Join(dir, "b.vmdk")
	tool(t, "qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", overlay, stream)
	ok(t, "image", "convert", stream, raw)
	ok(t, "image", "convert", "--source-format", "raw", raw, back)
	for _, made := range []string{raw, back} {
		tool(t, "qemu-img", "compare", overlay, made)
	}
	tool(t, "qemu-img", "check", back)
	flat := filepath.Join(dir, "flat.vmdk")
	ok(t, "image", "convert", "--subformat", "monolithicFlat", overlay, flat)
	tool(t, "qemu-img", "compare", overlay, flat)
	if r := run(t, "image", "convert", overlay, raw); r.code != 1 || !strings.Contains(r.stderr, "exists") {
		t.Errorf("convert over an image that exists: code %d, %s", r.code, r.stderr)
	}
}

func TestCreate_ResizeOverlay(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	dir := t.TempDir()
	base, overlay := filepath.Join(dir, "a.vmdk"), filepath.Join(dir, "b.vmdk")
	ok(t, "image", "create", "--cluster-size", "128K", base, "1Gi")
	ok(t, "image", "create", "--parent", base, overlay)
	ok(t, "image", "resize", overlay, "+512M")
	info := decode[imageInfo](t, tool(t, qemuImg, "info", "--output=json", overlay))
	if info.VirtualSize != 1536<<20 || info.BackingFilename != "a.vmdk" {
		t.Errorf("qemu-img sees %+v", info)
	}
	if info := decode[imageInfo](t, tool(t, qemuImg, "info", "--output=json", base)); info.ClusterSize != 128<<10 {
		t.Errorf("cluster size %d", info.ClusterSize)
	}
	tool(t, qemuImg, "check", overlay)
}

func TestErrors_AreOneSentence(t *testing.T) {
	dir := t.TempDir()
	raw := filepath.Join(dir, "a.raw")
	writeFile(t, raw, make([]byte, 1<<20))
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	ok(t, "image", "create", filepath.Join(dir, "base.vmdk"), "1M")
	escaping := filepath.Join(sub, "escaping.vmdk")
	ok(t, "image", "create", "--root", dir, "--parent", filepath.Join(dir, "base.vmdk"), escaping)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"image", "info", filepath.Join(dir, "nothing")}, "no such file"},
		{[]string{"image", "info", dir}, "invalid argument"},
		{[]string{"image", "create", filepath.Join(dir, "x.vmdk"), "12Q"}, "12Q"},
		{[]string{"image", "create", filepath.Join(dir, "x.vmdk")}, "size is needed"},
		{[]string{"image", "create", filepath.Join(dir, "x.what"), "1M"}, "give one of"},
		{[]string{"image", "create", "-f", "what", filepath.Join(dir, "x"), "1M"}, "want one of"},
		{[]string{"image", "create", "--subformat", "what", filepath.Join(dir, "x.vmdk"), "1M"}, "monolithicSparse"},
		{[]string{"image", "resize", raw, "512K"}, "--shrink"},
		{[]string{"image", "map", escaping}, "--root"},
		{[]string{"image", "info", "-o", "yaml", raw}, "text or json"},
		{[]string{"serve", raw}, "socket"},
		{[]string{"store", "list", dir}, "store"},
		{[]string{"standalone", "--endpoint", "unix:///x", "--store", "nothing"}, "NAME=PATH"},
		{[]string{"detach", "/dev/nothing", "--run-dir", dir}, "not attached"},
	} {
		r := run(t, c.args...)
		if r.code != 1 || !strings.HasPrefix(r.stderr, "error: ") || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, c.want) {
			t.Errorf("%v: exit code %d, want 1 and one sentence with %q:\n%s", c.args, r.code, c.want, r.stderr)
		}
	}
	ok(t, "image", "map", "--root", dir, escaping)
}

func TestLocate_FindsTheStore(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	volumes := filepath.Join(dir, "volumes", "v")
	if err := os.MkdirAll(volumes, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, storeFile), nil)
	link := filepath.Join(t.TempDir(), "link.vmdk")
	if err := os.Symlink(filepath.Join(volumes, "v.vmdk"), link); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(volumes, "v.vmdk"), nil)
	for _, c := range []struct{ path, root, wantRoot, wantName string }{
		{filepath.Join(volumes, "v.vmdk"), "", dir, "volumes/v/v.vmdk"},
		{link, "", dir, "volumes/v/v.vmdk"},
		{filepath.Join(volumes, "new.vmdk"), "", dir, "volumes/v/new.vmdk"},
		{filepath.Join(volumes, "v.vmdk"), volumes, volumes, "v.vmdk"},
	} {
		at, err := locate(c.path, c.root)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		if at.root != c.wantRoot || at.name != c.wantName {
			t.Errorf("%s in %q: %s in %s", c.path, c.root, at.name, at.root)
		}
		at.close()
	}
	if _, err := locate("/etc/passwd", dir); err == nil {
		t.Error("a file outside of the root is accepted")
	}
}

func TestCheck_Repairs(t *testing.T) {
	base, _ := chain(t)
	f, err := os.OpenFile(base, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 256<<10)); err != nil { // grains that nothing refers to
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if r := run(t, "image", "check", base); r.code != checkLeaks {
		t.Errorf("check of an image with lost space: code %d, want %d: %s%s", r.code, checkLeaks, r.stdout, r.stderr)
	}
	report := decode[checkReport](t, ok(t, "image", "check", "--repair", "-o", "json", base))
	if report.LeaksFixed != 4 || report.Leaks != 0 {
		t.Errorf("repair: %+v", report)
	}
	ok(t, "image", "check", base)
	tool(t, "qemu-img", "check", base)
}
