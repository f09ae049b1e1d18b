package store_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
)

// qemuImg runs qemu-img and returns what it prints.
func qemuImg(t *testing.T, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(testenv.Oracle(t, "qemu-img"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
	return out
}

// backingChain returns how many images qemu-img finds below one, with it.
func backingChain(t *testing.T, path string) int {
	t.Helper()
	var chain []struct {
		Filename string `json:"filename"`
	}
	must(t, json.Unmarshal(qemuImg(t, "info", "--backing-chain", "--output=json", path), &chain))
	return len(chain)
}

// What the store makes is what qemu-img takes: every layer checks clean, chains are found
// by their links, and hold what the volumes and snapshots held.
func TestQEMU(t *testing.T) {
	testenv.Oracle(t, "qemu-img")
	s, dir := newDirStore(t)
	ctx := t.Context()
	putImage(t, dir, "base.vmdk", "vmdk", 8*mib)
	create(t, s, store.CreateVolumeRequest{Name: "v", Source: store.Source{Image: "base.vmdk"}})
	for generation, snap := range []string{"s1", "s2"} {
		a := attach(t, s, "v", "n")
		writeStamp(t, a, 0, byte(generation+1))
		writeStamp(t, a, int64(generation+2)*mib, byte(generation+1))
		must(t, ignoreSnapshot(s.CreateSnapshot(ctx, "v", snap)))
		writeStamp(t, a, 5*mib, byte(generation+1))
		detach(t, s, a)
	}
	create(t, s, store.CreateVolumeRequest{Name: "larger", SizeBytes: 20 * mib, Source: store.Source{Snapshot: "v@s1"}})
	a := attach(t, s, "larger", "n")
	writeStamp(t, a, 19*mib, 7)
	must(t, ignoreRecord(s.Expand(ctx, "larger", 40*mib, 0)))
	writeStamp(t, a, 39*mib, 7)
	detach(t, s, a)
	create(t, s, store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "larger"}})
	create(t, s, store.CreateVolumeRequest{Name: "flat", SizeBytes: mib, Format: "vmdk", Parameters: store.Parameters{Subformat: "monolithicFlat"}})
	must(t, ignoreSnapshot(s.CreateSnapshot(ctx, "flat", "f")))
	rewriteAt(t, s, "flat", 0, 3)

	volumes, err := s.Volumes(ctx)
	must(t, err)
	for _, v := range volumes {
		for _, l := range v.Record.Layers {
			qemuImg(t, "check", dir.Path(l.File))
		}
		top := dir.Path(v.Record.Layers[len(v.Record.Layers)-1].File)
		if n := backingChain(t, top); n != len(v.Record.Layers) {
			t.Errorf("%s: qemu-img finds %d layers, the record has %d", v.Name, n, len(v.Record.Layers))
		}
		compareWithQEMU(t, s, v.Name, "", top)
	}
	snap, err := s.Snapshot(ctx, "v", "s1")
	must(t, err)
	compareWithQEMU(t, s, "v", "s1", dir.Path(snap.Layer))

	// Merged layers are as good as those they were made of.
	must(t, s.DeleteSnapshot(ctx, "v", "s2"))
	result, err := s.GC(ctx)
	must(t, err)
	if len(result.MergedVolumes) != 1 {
		t.Errorf("collected %+v", result)
	}
	rec, err := s.Volume(ctx, "v")
	must(t, err)
	top := dir.Path(rec.Layers[len(rec.Layers)-1].File)
	qemuImg(t, "check", top)
	compareWithQEMU(t, s, "v", "", top)
	expectClean(t, s)
}

func rewriteAt(tb testing.TB, s *store.Store, name string, off int64, generation byte) {
	tb.Helper()
	a, err := s.Attach(tb.Context(), name, store.AttachOptions{})
	must(tb, err)
	writeStamp(tb, a, off, generation)
	must(tb, a.Close())
}

// compareWithQEMU compares what the store reads with what qemu-img reads from the files.
func compareWithQEMU(t *testing.T, s *store.Store, name, snapshot, top string) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	qemuImg(t, "convert", "-O", "raw", top, raw)
	a, err := s.Attach(t.Context(), name, store.AttachOptions{Snapshot: snapshot, ReadOnly: true})
	must(t, err)
	defer func() { must(t, a.Close()) }()
	ours := make([]byte, a.Info().SizeBytes)
	_, err = a.ReadAt(ours, 0)
	must(t, err)
	if theirs := readFile(t, raw); string(theirs) != string(ours) {
		t.Errorf("volume %s, snapshot %q: qemu-img reads %d bytes that differ from our %d", name, snapshot, len(theirs), len(ours))
	}
}

func readFile(tb testing.TB, path string) []byte {
	tb.Helper()
	data, err := os.ReadFile(path)
	must(tb, err)
	return data
}
