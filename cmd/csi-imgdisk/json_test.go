package main

import (
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// theirImage converts a source with qemu-img.
func theirImage(t *testing.T, l layout, source string) string {
	t.Helper()
	if l.format == "qcow" && len(l.ours) > 0 {
		t.Skip("qemu-img 7.2 fails to compress QCOW")
	}
	image := filepath.Join(t.TempDir(), "image.img")
	tool(t, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", l.format}, l.qemu...), source, image)...)
	return image
}

// What qemu-img says about an image of any kind, we say in the same words.
func TestJSON_InfoOfEveryLayout(t *testing.T) {
	source := rawSource(t, oracleSize)
	eachLayout(t, func(t *testing.T, l layout) {
		image := theirImage(t, l, source)
		want := decode[map[string]any](t, tool(t, "qemu-img", "info", "--output=json", "-f", l.format, image))
		got := decode[map[string]any](t, ok(t, "image", "info", "-o", "json", "-f", l.format, image))
		sameFields(t, "info", got, want, "format-specific")
		if want["format-specific"] == nil {
			return
		}
		sameFields(t, "format-specific", specific(got), specific(want), "extents")
		theirs, _ := specific(want)["extents"].([]any)
		ours, _ := specific(got)["extents"].([]any)
		if len(ours) != len(theirs) {
			t.Fatalf("%d extents, qemu-img has %d", len(ours), len(theirs))
		}
		for i := range theirs {
			sameFields(t, "extent", extentOf(ours[i]), extentOf(theirs[i]), "format", "filename")
		}
	})
}

func extentOf(v any) map[string]any { return v.(map[string]any) }

func TestJSON_CheckOfEveryLayout(t *testing.T) {
	source := rawSource(t, oracleSize)
	eachLayout(t, func(t *testing.T, l layout) {
		image := theirImage(t, l, source)
		qemu := exec.Command("qemu-img", "check", "--output=json", "-f", l.format, image)
		out, _ := qemu.Output() // its exit code is what counts
		r := run(t, "image", "check", "-o", "json", "-f", l.format, image)
		switch code := qemu.ProcessState.ExitCode(); {
		case code == checkUnsupported: // we may know more
			if r.code != 0 && r.code != checkUnsupported {
				t.Errorf("check: code %d, %s", r.code, r.stderr)
			}
		case code != r.code:
			t.Errorf("check: code %d, qemu-img's is %d: %s", r.code, code, r.stderr)
		default:
			// What counts as fragmented in compressed images is each one's own.
			sameFields(t, "check", decode[map[string]any](t, r.stdout), decode[map[string]any](t, string(out)), "fragmented-clusters")
		}
	})
}

// qemuRun is a run of qemu-img map; ours are mapEntry.
type qemuRun struct {
	Start, Length       int64
	Depth               int
	Present, Zero, Data bool
	Offset              *int64
}

// Where qemu-img map knows something, we know the same.
func TestJSON_MapOfEveryLayout(t *testing.T) {
	source := rawSource(t, oracleSize)
	eachLayout(t, func(t *testing.T, l layout) {
		if l.format == "vhdx" {
			t.Skip("qemu-img knows nothing of a VHDX's allocation")
		}
		image := theirImage(t, l, source)
		theirs := decode[[]qemuRun](t, tool(t, "qemu-img", "map", "--output=json", "-f", l.format, image))
		ours := decode[[]mapEntry](t, ok(t, "image", "map", "-o", "json", "-f", l.format, image))
		for at, end := int64(0), theirs[len(theirs)-1].Start+theirs[len(theirs)-1].Length; at < end; {
			a := theirs[slices.IndexFunc(theirs, func(r qemuRun) bool { return at < r.Start+r.Length })]
			i := slices.IndexFunc(ours, func(r mapEntry) bool { return at < r.Start+r.Length })
			if i < 0 {
				t.Fatalf("nothing is said about guest offset %d", at)
			}
			compareRuns(t, l, at, a, ours[i])
			at = min(a.Start+a.Length, ours[i].Start+ours[i].Length)
		}
	})
}

// compareRuns compares what is said about one guest offset. Of flat files and of tables
// without data behind them, qemu-img says less or more than we do: whether holes in them
// count as data.
func compareRuns(t *testing.T, l layout, at int64, theirs qemuRun, ours mapEntry) {
	t.Helper()
	holes := theirs.Zero != ours.Zero && slices.Contains(l.ours, "--preallocation") || theirs.Zero && theirs.Data
	switch {
	case holes:
	case theirs.Zero != ours.Zero, theirs.Data != ours.Data, theirs.Depth != ours.Depth:
		t.Errorf("guest offset %d: %+v, qemu-img says %+v", at, ours, theirs)
	case theirs.Offset == nil || !theirs.Data:
	case ours.Offset == nil || *ours.Offset-ours.Start != *theirs.Offset-theirs.Start:
		t.Errorf("guest offset %d: %+v, qemu-img says it is at %d", at, ours, *theirs.Offset+at-theirs.Start)
	}
	if l.format != "vdi" && l.format != "vpc" && theirs.Present != ours.Present { // there, it says present of what no block holds
		t.Errorf("guest offset %d: present is %v, qemu-img says %v", at, ours.Present, theirs.Present)
	}
}

// qemu-img counts all tables that an image can have as required, also those without which
// the data can be stored.
func TestJSON_Measure(t *testing.T) {
	source := rawSource(t, oracleSize)
	eachLayout(t, func(t *testing.T, l layout) {
		made := filepath.Join(t.TempDir(), "made.img")
		ours := decode[measurement](t, ok(t, measureArgs(l, source)...))
		if !slices.Contains(append(l.ours, l.qemu...), "-c") && !slices.Contains(l.ours, "--compress") {
			ok(t, append([]string{"image", "convert", "-f", "raw", "-O", l.format, source, made}, l.ours...)...)
			info := decode[imageInfo](t, ok(t, "image", "info", "-o", "json", "-f", l.format, made))
			if ours.Required < info.ActualSize/2 || ours.Required > ours.FullyAllocated {
				t.Errorf("%+v, but the image made takes %d", ours, info.ActualSize)
			}
		}
		if l.format != "qcow2" && l.format != "raw" || slices.Contains(l.ours, "--preallocation") {
			return // qemu-img does not measure it, or counts other space
		}
		var options []string
		if i := slices.Index(l.qemu, "-o"); i >= 0 {
			options = l.qemu[i : i+2]
		}
		args := append([]string{"measure", "--output=json", "-O", l.format, "-f", "raw", source}, options...)
		theirs := decode[measurement](t, tool(t, "qemu-img", args...))
		if ours.FullyAllocated != theirs.FullyAllocated || ours.Required > theirs.Required {
			t.Errorf("%+v, qemu-img says %+v", ours, theirs)
		}
	})
}

func measureArgs(l layout, source string) []string {
	args := []string{"image", "measure", "-o", "json", "-O", l.format, "-f", "raw", source}
	for _, a := range l.ours {
		if a != "-c" && a != "--compress" {
			args = append(args, a)
		}
	}
	return args
}

// Of a chain of several formats, every layer is described as qemu-img does.
func TestJSON_Chain(t *testing.T) {
	qemuImg, qemuIO := testenv.Oracle(t, "qemu-img"), testenv.Oracle(t, "qemu-io")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	tool(t, qemuImg, "create", "-q", "-f", "raw", path("base.raw"), "8M")
	tool(t, qemuIO, "-f", "raw", "-c", "write -P 1 1M 2M", path("base.raw"))
	tool(t, qemuImg, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path("middle.qcow2"))
	tool(t, qemuIO, "-c", "write -P 2 2M 2M", "-c", "write -z 5M 1M", path("middle.qcow2"))
	tool(t, qemuImg, "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", path("top.qcow2"))
	tool(t, qemuIO, "-c", "write -P 3 0 64k", path("top.qcow2"))
	want := decode[[]map[string]any](t, tool(t, qemuImg, "info", "--backing-chain", "--output=json", path("top.qcow2")))
	got := decode[[]map[string]any](t, ok(t, "image", "info", "--backing-chain", "-o", "json", path("top.qcow2")))
	if len(got) != len(want) {
		t.Fatalf("%d layers, want %d", len(got), len(want))
	}
	for i := range want {
		sameFields(t, "info", got[i], want[i], "format-specific")
	}
	wantMap := decode[[]map[string]any](t, tool(t, qemuImg, "map", "--output=json", path("top.qcow2")))
	gotMap := decode[[]map[string]any](t, ok(t, "image", "map", "-o", "json", path("top.qcow2")))
	if len(gotMap) != len(wantMap) {
		t.Fatalf("%d extents, qemu-img has %d: %v, %v", len(gotMap), len(wantMap), gotMap, wantMap)
	}
	for i := range wantMap {
		sameFields(t, "map", gotMap[i], wantMap[i])
	}
}

// A lazy image whose writer died is dirty.
func TestJSON_DirtyFlag(t *testing.T) {
	qemuImg, qemuIO := testenv.Oracle(t, "qemu-img"), testenv.Oracle(t, "qemu-io")
	image := filepath.Join(t.TempDir(), "image.qcow2")
	tool(t, qemuImg, "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "4M")
	for _, want := range []bool{false, true} {
		if want {
			_ = exec.Command(qemuIO, "-c", "write 0 64k", "-c", "flush", "-c", "abort", image).Run() // it dies
		}
		theirs := decode[imageInfo](t, tool(t, qemuImg, "info", "--output=json", image))
		ours := decode[imageInfo](t, ok(t, "image", "info", "-o", "json", image))
		if theirs.DirtyFlag != want || ours.DirtyFlag != want {
			t.Errorf("dirty: %v, qemu-img says %v, want %v", ours.DirtyFlag, theirs.DirtyFlag, want)
		}
	}
}

// Internal snapshots are listed as qemu-img info has them.
func TestJSON_Snapshots(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	image := filepath.Join(t.TempDir(), "image.qcow2")
	tool(t, qemuImg, "create", "-q", "-f", "qcow2", image, "4M")
	tool(t, qemuImg, "snapshot", "-c", "monday", image)
	tool(t, qemuImg, "snapshot", "-c", "tuesday", image)
	want := decode[map[string]any](t, tool(t, qemuImg, "info", "--output=json", image))["snapshots"].([]any)
	got := decode[[]map[string]any](t, ok(t, "image", "snapshot", "--list", "-o", "json", image))
	if len(got) != len(want) {
		t.Fatalf("%d snapshots, want %d", len(got), len(want))
	}
	for i := range want {
		sameFields(t, "snapshot", got[i], want[i].(map[string]any))
	}
}
