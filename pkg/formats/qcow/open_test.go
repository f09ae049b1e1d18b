package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"runtime"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// expectRefused fails the test unless an error is of a kind and names everything in says.
func expectRefused(t testing.TB, err, kind error, says ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%v, want %v", err, kind)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

func TestOpen_RefusesHeaders(t *testing.T) {
	be := binary.BigEndian
	b32 := func(v uint32) []byte { return be.AppendUint32(nil, v) }
	b64 := func(v uint64) []byte { return be.AppendUint64(nil, v) }
	for name, c := range map[string]struct {
		off  int64
		p    []byte
		kind error
		says string
	}{
		"magic":                  {0, []byte("KDMV"), block.ErrUnsupported, "does not start with"},
		"version 2":              {4, b32(2), block.ErrUnsupported, "qcow2"},
		"cluster_bits 8":         {atClusterBits, []byte{8}, block.ErrCorrupt, "cluster_bits is 8"},
		"cluster_bits 17":        {atClusterBits, []byte{17}, block.ErrCorrupt, "cluster_bits is 17"},
		"cluster_bits 255":       {atClusterBits, []byte{255}, block.ErrCorrupt, "cluster_bits is 255"},
		"l2_bits 5":              {atL2Bits, []byte{5}, block.ErrCorrupt, "l2_bits is 5"},
		"l2_bits 14":             {atL2Bits, []byte{14}, block.ErrCorrupt, "l2_bits is 14"},
		"crypt_method 2":         {atCrypt, b32(2), block.ErrUnsupported, "crypt_method is 2"},
		"size 0":                 {atSize, b64(0), block.ErrCorrupt, "size is 0"},
		"size too large":         {atSize, b64(1 << 62), block.ErrUnsupported, "level 1 entries"},
		"size all ones":          {atSize, b64(1<<64 - 1), block.ErrUnsupported, "level 1 entries"},
		"table past the file":    {atSize, b64(7 << 40), block.ErrCorrupt, "lies outside the file"},
		"l1 in the header":       {atL1, b64(40), block.ErrCorrupt, "l1_table_offset"},
		"l1 across entries":      {atL1, b64(516), block.ErrCorrupt, "l1_table_offset"},
		"l1 outside":             {atL1, b64(smallEnd), block.ErrCorrupt, "lies outside the file"},
		"l1 far outside":         {atL1, b64(1<<64 - 8), block.ErrCorrupt, "lies outside the file"},
		"backing in the header":  {atBackingOffset, append(b64(40), b32(4)...), block.ErrCorrupt, "backing file's name"},
		"backing outside":        {atBackingOffset, append(b64(smallEnd-1), b32(4)...), block.ErrCorrupt, "backing file's name"},
		"backing far outside":    {atBackingOffset, append(b64(1<<64-2), b32(4)...), block.ErrCorrupt, "backing file's name"},
		"backing too long":       {atBackingOffset, append(b64(48), b32(1024)...), block.ErrCorrupt, "backing_file_size is 1024"},
		"backing over the table": {atBackingOffset, append(b64(smallL1-12), b32(20)...), block.ErrCorrupt, "overlaps the level 1 table"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t, nil)
			poke(t, fsys, "a.qcow", c.off, c.p...)
			_, err := tryOpen(fsys, "a.qcow", vfs.ReadOnly)
			expectRefused(t, err, c.kind, "a.qcow", c.says)
		})
	}
}

func TestOpen_TruncatedHeader(t *testing.T) {
	for _, size := range []int64{0, 1, 47, 48, smallL1, smallL1 + 23} {
		fsys := newSmall(t, nil)
		truncate(t, fsys, "a.qcow", size)
		_, err := tryOpen(fsys, "a.qcow", vfs.ReadOnly)
		expectRefused(t, err, block.ErrCorrupt)
	}
}

// A disk of 167 TB in a file of 516 bytes.
func TestOpen_HugeDiskTakesNoMemory(t *testing.T) {
	fsys := newSmall(t, nil)
	poke(t, fsys, "a.qcow", atClusterBits, 9, 6)
	truncate(t, fsys, "a.qcow", 516)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, size := range []uint64{167e12, 128 << 30} {
		poke64(t, fsys, "a.qcow", atSize, size)
		if _, err := tryOpen(fsys, "a.qcow", vfs.ReadOnly); err == nil {
			t.Errorf("%d bytes: opened", size)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}

func TestOpen_BackingFileNames(t *testing.T) {
	for name, kind := range map[string]error{
		"/etc/passwd":       fs.ErrInvalid,
		"../secret":         fs.ErrInvalid,
		"sub/../../secret":  fs.ErrInvalid,
		"json:{}":           fs.ErrInvalid,
		"nbd:unix:/socket":  fs.ErrInvalid,
		"file:///etc/hosts": fs.ErrInvalid,
		"\x00name":          fs.ErrInvalid,
		"a.qcow":            block.ErrCorrupt, // itself
		"missing":           fs.ErrNotExist,
		"missing\x00behind": fs.ErrNotExist,
	} {
		fsys := newSmall(t, nil)
		poke64(t, fsys, "a.qcow", atBackingOffset, 48)
		poke(t, fsys, "a.qcow", atBackingSize, 0, 0, 0, byte(len(name)))
		poke(t, fsys, "a.qcow", 48, []byte(name)...)
		image, err := tryOpen(fsys, "a.qcow", vfs.ReadOnly)
		if err == nil {
			image.Close()
		}
		if !errors.Is(err, kind) {
			t.Errorf("backing file %q: %v, want %v", name, err, kind)
		}
	}
}

// An offset without a length, or the reverse, is no backing file, as QEMU takes it.
func TestOpen_HalfABackingFile(t *testing.T) {
	fsys := newSmall(t, nil)
	poke64(t, fsys, "a.qcow", atBackingOffset, 48)
	if parent := mustOpen(t, fsys, "a.qcow", vfs.ReadOnly).Layers()[0].Parent; parent != nil {
		t.Errorf("it stands on %+v", parent)
	}
}

func TestOpen_Encrypted(t *testing.T) {
	fsys := newSmall(t, map[string]string{"encrypt.format": "aes"})
	open := func(secret formats.Secret) (*formats.Image, error) {
		return formats.Open(context.Background(), fsys, "a.qcow", formats.OpenOptions{Format: "qcow", Secret: secret})
	}
	_, err := open(nil)
	expectRefused(t, err, block.ErrInvalid, "a.qcow is encrypted", "--secret-file")

	broken := errors.New("no such file")
	if _, err = open(func(string) ([]byte, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("%v, want what the secret says", err)
	}
	image, err := open(func(name string) ([]byte, error) {
		if name != "a.qcow" {
			t.Errorf("asked for the password of %q", name)
		}
		return []byte("another password"), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if bytes.Equal(mustRead(t, image, 0, smallCluster), smallData(0)) {
		t.Error("another password reads the contents")
	}
	if bytes.Contains(peek(t, fsys, "a.qcow"), smallData(0)[:16]) {
		t.Error("the file has the contents in the clear")
	}
}

// Without the password in the request, nothing is created.
func TestCreate_EncryptedNeedsAPassword(t *testing.T) {
	fsys := vfs.NewMem()
	err := qcow.Format{}.Create(context.Background(), formats.CreateRequest{
		FS: fsys, Name: "a.qcow", SizeBytes: 1 << 20, Extra: map[string]string{"encrypt.format": "aes"},
	})
	expectRefused(t, err, block.ErrInvalid, "--secret-file")
	if _, err := fsys.Stat("a.qcow"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
}

// TestOpen_OddSize: the guest has all of the last sector's bytes that the header says.
func TestOpen_OddSize(t *testing.T) {
	for _, extra := range []map[string]string{nil, {"encrypt.format": "aes"}} {
		fsys := newSmall(t, extra)
		const size = 2*smallCluster + 700
		poke64(t, fsys, "a.qcow", atSize, size)
		image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
		if n := image.Info().SizeBytes; n != size {
			t.Errorf("%d bytes, want %d", n, size)
		}
		mustWrite(t, image, size-10, []byte("0123456789"))
		mustClose(t, image)
		image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
		want := append(smallData(2)[:690:690], "0123456789"...)
		if !bytes.Equal(mustRead(t, image, 2*smallCluster, 700), want) {
			t.Error("the end does not read as it was written")
		}
		// What was past the end must not come up.
		if err := image.Resize(4 * smallCluster); err != nil {
			t.Fatal(err)
		}
		want = append(want, make([]byte, 2*smallCluster-700)...)
		if !bytes.Equal(mustRead(t, image, 2*smallCluster, 2*smallCluster), want) {
			t.Error("grown, it shows what was past the end")
		}
		mustClose(t, image)
		if found := checkImage(t, fsys, "a.qcow", false); len(found.Problems) > 0 {
			t.Errorf("check found %+v", found)
		}
	}
}

func TestProbe(t *testing.T) {
	head := peek(t, newSmall(t, nil), "a.qcow")[:formats.ProbeBytes]
	if !(qcow.Format{}).Probe(head, smallEnd) {
		t.Error("not recognised")
	}
	for what, not := range map[string][]byte{
		"qcow2": append(binary.BigEndian.AppendUint32(bytes.Clone(head[:4]), 2), head[8:]...), "short": head[:47], "empty": nil,
	} {
		if (qcow.Format{}).Probe(not, smallEnd) {
			t.Errorf("%s is taken for it", what)
		}
	}
}

// Each session in which something is changed gives the image another identity; those in which
// nothing is do not.
func TestBegin_ChangesTheIdentity(t *testing.T) {
	fsys := newSmall(t, nil)
	identity := func(change func(*formats.Image)) string {
		t.Helper()
		image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
		if change != nil {
			change(image)
		}
		id := string(image.Layers()[0].Codec.Identity())
		mustClose(t, image)
		return id
	}
	seen := map[string]bool{identity(nil): true}
	if !seen[identity(nil)] {
		t.Error("it is another one although nothing was changed")
	}
	for range 5 {
		id := identity(func(image *formats.Image) { mustWrite(t, image, 0, []byte{1}) })
		if seen[id] {
			t.Errorf("it is %q again", id)
		}
		seen[id] = true
		if !seen[identity(nil)] {
			t.Error("it is another one after reopening")
		}
	}
}
