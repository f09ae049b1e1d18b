package vmdk_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// convertToStream makes an a.vmdk of guest bytes in fsys, a stream unless req says otherwise.
func convertToStream(t testing.TB, fsys vfs.FS, disk []byte, req formats.CreateRequest) {
	t.Helper()
	addFile(t, fsys, "disk.raw", disk)
	image, err := formats.Open(context.Background(), fsys, "disk.raw", formats.OpenOptions{Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	req.FS, req.Name, req.Subformat = fsys, "a.vmdk", cmp.Or(req.Subformat, "streamOptimized")
	if err := formats.Convert(context.Background(), image, vmdk.Format{}, req, nil); err != nil {
		t.Fatal(err)
	}
}

// What we write in one pass is read by QEMU, 7-Zip and libvmdk, and by us.
func TestOracle_WriteStream(t *testing.T) {
	incompressible := func(r interface{ Uint32() uint32 }) []byte {
		p := make([]byte, 1<<20)
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		return p
	}
	for name, disk := range map[string]func(r interface{ Uint32() uint32 }) []byte{
		"empty":           func(interface{ Uint32() uint32 }) []byte { return make([]byte, 50<<20) },
		"text":            func(interface{ Uint32() uint32 }) []byte { return bytes.Repeat([]byte("some text\n"), 700<<10) },
		"incompressible":  incompressible,
		"holes in tables": func(r interface{ Uint32() uint32 }) []byte { return sparseDisk(r, 150<<20) },
		"odd end":         func(r interface{ Uint32() uint32 }) []byte { return incompressible(r)[:300*512+512] },
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			fsys, err := vfs.OpenDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer fsys.Close()
			want := disk(r)
			want = want[:len(want)/512*512]
			convertToStream(t, fsys, want, formats.CreateRequest{})
			image := mustOpen(t, dir, "a.vmdk", vfs.ReadOnly)
			if !bytes.Equal(readGuest(t, image), want) {
				t.Error("the contents differ from what was converted")
			}
			checkClean(t, image)
			compareInfo(t, dir, "a.vmdk", image)
			if out := qemuImg(t, dir, "check", "-f", "vmdk", "a.vmdk"); !strings.Contains(out, "No errors") {
				t.Errorf("qemu-img check: %s", out)
			}
			qemuImg(t, dir, "compare", "-f", "vmdk", "-F", "raw", "a.vmdk", "disk.raw")
			sevenZip(t, dir, want)
			if out := oracle(t, dir, "vmdkinfo", "a.vmdk"); !strings.Contains(out, "Stream optimized") {
				t.Errorf("vmdkinfo: %s", out)
			}
		})
	}
}

// sevenZip fails the test unless 7-Zip extracts a disk from a.vmdk.
func sevenZip(t *testing.T, dir string, want []byte) {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, "7z"), "x", "-so", "-tvmdk", "a.vmdk")
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil || !bytes.Equal(out, want) {
		t.Errorf("7z extracts %d bytes that differ from the %d written, error %v", len(out), len(want), err)
	}
}

// sparseDisk returns a disk with a little data in some grain tables.
func sparseDisk(r interface{ Uint32() uint32 }, size int) []byte {
	p := make([]byte, size)
	for range 20 {
		off := int(r.Uint32()) % (size - 200<<10)
		for i := range 100 << 10 {
			p[off+i] = byte(r.Uint32() >> (i / 4096 % 9))
		}
	}
	return p
}

// libvmdk mounts what we write, and reads the same bytes. (It does not know monolithicFlat.)
func TestOracle_Libvmdk(t *testing.T) {
	mount := testenv.Oracle(t, "vmdkmount")
	unmount := testenv.Oracle(t, "umount")
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		t.Skip("FUSE cannot be used here")
	}
	for _, subformat := range []string{
		"streamOptimized", "monolithicSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs", "vmfsSparse",
	} {
		t.Run(subformat, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			fsys, err := vfs.OpenDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer fsys.Close()
			want := sparseDisk(r, 40<<20)
			convertToStream(t, fsys, want, formats.CreateRequest{Subformat: subformat})
			point := filepath.Join(dir, "mnt")
			if err := os.Mkdir(point, 0o700); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(mount, filepath.Join(dir, "a.vmdk"), point).CombinedOutput(); err != nil {
				t.Fatalf("vmdkmount: %v: %s", err, out)
			}
			defer func() {
				if out, err := exec.Command(unmount, point).CombinedOutput(); err != nil {
					t.Errorf("unmount: %v: %s", err, out)
				}
			}()
			if got, err := os.ReadFile(filepath.Join(point, "vmdk1")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("libvmdk reads %d other bytes than the %d written, error %v", len(got), len(want), err)
			}
		})
	}
}

// Tables of a stream are written before the end: memory does not grow with the disk.
func TestWriteStream_Memory(t *testing.T) {
	fsys, err := vfs.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	const tables, step = 6000, 32 << 20
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: tables * step, Subformat: "streamOptimized"})
	image, err := formats.Open(context.Background(), fsys, "a.vmdk", formats.OpenOptions{
		Format: "vmdk", Mode: vfs.ReadWrite, TableCacheBytes: 1 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range int64(tables) {
		packed, err := image.Pack(bytes.Repeat([]byte{byte(i) | 1}, 64<<10), i*step)
		if err == nil {
			err = image.WritePacked(packed)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 8<<20 {
		t.Errorf("%d KiB are in use after %d tables", n>>10, tables)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
	for i := int64(0); i < tables; i += 997 {
		p := make([]byte, 64<<10)
		if _, err := image.ReadAt(p, i*step); err != nil || p[0] != byte(i)|1 || p[len(p)-1] != p[0] {
			t.Errorf("grain %d: %x, %v", i, p[0], err)
		}
	}
	checkClean(t, image)
}

// A stream is what VMware's rules say: markers before everything, grains in ascending
// order, each table behind its grains, no grain of zeroes, the directory at the end.
func TestWriteStream_Layout(t *testing.T) {
	r := testenv.Rand(t)
	fsys := vfs.NewMem()
	disk := sparseDisk(r, 100<<20)
	convertToStream(t, fsys, disk, formats.CreateRequest{})
	p := peek(t, fsys, "a.vmdk")
	le := binary.LittleEndian
	if le.Uint32(p[4:]) != 3 || le.Uint32(p[8:]) != 1|1<<16|1<<17 || le.Uint16(p[77:]) != 1 || le.Uint64(p[56:]) != 1<<64-1 {
		t.Errorf("header % x", p[:80])
	}
	if !bytes.HasPrefix(p[512:], []byte("# Disk DescriptorFile\nversion=1\n")) || le.Uint64(p[36:]) != 20 {
		t.Errorf("descriptor %q", p[512:600])
	}
	last, kinds, table := int64(-1), "", int64(-1)
	for off := int64(le.Uint64(p[64:])) * 512; off < int64(len(p)); {
		value, size, kind := int64(le.Uint64(p[off:])), int64(le.Uint32(p[off+8:])), le.Uint32(p[off+12:])
		if size > 0 {
			if value <= last || value%128 != 0 {
				t.Fatalf("grain of sector %d after %d", value, last)
			}
			if ti := value / 128 / 512; ti != table && kinds != "" && !strings.HasSuffix(kinds, "T") {
				t.Fatalf("a grain of table %d follows one of table %d", ti, table)
			} else if table = ti; !strings.HasSuffix(kinds, "g") {
				kinds += "g"
			}
			last = value
			off += (12 + size + 511) / 512 * 512
			continue
		}
		kinds += map[uint32]string{0: "E", 1: "T", 2: "D", 3: "F"}[kind]
		off += 512 + value*512
	}
	if !strings.HasPrefix(kinds, "gT") || strings.Trim(strings.TrimSuffix(kinds, "DFE"), "gT") != "" || !strings.HasSuffix(kinds, "gTDFE") {
		t.Errorf("what follows one another is %q", kinds)
	}
}

// Only an empty stream is written, and only from its beginning to its end.
func TestWriteStream_Refuses(t *testing.T) {
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: 1 << 20, Subformat: "streamOptimized"})
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	p := bytes.Repeat([]byte("x"), 64<<10)
	pack := func(off int64) error {
		packed, err := image.Pack(bytes.Clone(p), off)
		if err != nil {
			t.Fatal(err)
		}
		return image.WritePacked(packed)
	}
	if _, err := image.WriteAt(p, 0); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("plain write: error %v, want %v", err, block.ErrUnsupported)
	}
	if err := pack(128 << 10); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{128 << 10, 0} {
		if err := pack(off); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("grain at %d after one at 128 KiB: error %v, want %v", off, err, block.ErrInvalid)
		}
	}
	if err := image.Resize(2 << 20); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("resize: error %v, want %v", err, block.ErrUnsupported)
	}
	got := make([]byte, 64<<10)
	if _, err := image.ReadAt(got, 128<<10); err != nil || !bytes.Equal(got, p) {
		t.Errorf("a grain of an unfinished stream reads as something else: %v", err)
	}
	if _, err := memTryOpen(fsys.Clone(), "a.vmdk", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "never finished") {
		t.Errorf("an unfinished stream is opened with error %v", err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	if _, _, ok := image.CompressedGranule(0); ok || !image.Info().ReadOnly {
		t.Error("a finished stream can be written")
	}
}

// The identifier of a stream is its own, whatever is converted.
func TestWriteStream_FreshCID(t *testing.T) {
	seen := map[uint32]bool{}
	for range 3 {
		fsys := vfs.NewMem()
		convertToStream(t, fsys, []byte(strings.Repeat("y", 64<<10)), formats.CreateRequest{})
		cid := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly).Layers()[0].Codec.Describe().Details[0].Value.(uint32)
		if seen[cid] {
			t.Errorf("CID %08x twice", cid)
		}
		seen[cid] = true
	}
}
