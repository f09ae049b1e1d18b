package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// theirs are images that qemu-img makes: by format, the subformat that we count one as,
// and the options of qemu-img convert. (Its version 7.2 does not manage convert -c to qcow.)
var theirs = []struct{ format, subformat, options string }{
	{"vmdk", "monolithicSparse", ""},
	{"vmdk", "monolithicSparse", "-o subformat=monolithicSparse,zeroed_grain=on"},
	{"vmdk", "monolithicSparse", "-o compat6,adapter_type=lsilogic"},
	{"vmdk", "monolithicFlat", "-o subformat=monolithicFlat"},
	{"vmdk", "twoGbMaxExtentSparse", "-o subformat=twoGbMaxExtentSparse"},
	{"vmdk", "twoGbMaxExtentFlat", "-o subformat=twoGbMaxExtentFlat"},
	{"vmdk", "streamOptimized", "-o subformat=streamOptimized"},
	{"vdi", "dynamic", ""},
	{"vdi", "static", "-o static=on"},
	{"vhdx", "dynamic", ""},
	{"vhdx", "dynamic", "-o block_size=1M"},
	{"vhdx", "dynamic", "-o block_size=4M,log_size=4M,block_state_zero=off"},
	{"vhdx", "fixed", "-o subformat=fixed"},
	{"qcow", "", ""},
	{"qcow2", "", ""},
	{"qcow2", "", "-c"},
	{"qcow2", "", "-c -o compression_type=zstd"},
	{"qcow2", "", "-o compat=0.10"},
	{"qcow2", "", "-o compat=0.10 -c"},
	{"qcow2", "", "-o cluster_size=512"},
	{"qcow2", "", "-o cluster_size=2M"},
	{"qcow2", "", "-o refcount_bits=1"},
	{"qcow2", "", "-o refcount_bits=64"},
	{"qcow2", "", "-o extended_l2=on"},
	{"qcow2", "", "-o extended_l2=on -c"},
	{"qcow2", "", "-o lazy_refcounts=on"},
	{"qcow2", "", "-o preallocation=metadata"},
	{"qcow2", "", "-o data_file=DATA"},
	{"qcow2", "", "-o data_file=DATA,data_file_raw=on"},
	{"vpc", "dynamic", "-o force_size=on"},
	{"vpc", "fixed", "-o subformat=fixed,force_size=on"},
	{"raw", "", ""},
}

// We read from images that qemu-img makes what it put in, find them sound, and leave them
// sound and right when we have written to them.
func TestTheirs_QEMU(t *testing.T) {
	testenv.Oracle(t, "qemu-img")
	for _, image := range theirs {
		format, err := formats.Lookup(image.format)
		if err != nil {
			continue // not registered
		}
		name := strings.TrimSpace(image.format + " " + image.options)
		t.Run(name, func(t *testing.T) {
			useTheirs(t, kind{format, image.subformat}, image.options, testenv.Rand(t))
		})
	}
}

func useTheirs(t *testing.T, k kind, options string, r *rand.Rand) {
	d := newWorkDir(t)
	want := randomDisk(r, k.size(r))
	raw := d.writeRaw(t, "want.raw", want)
	// The data file is named as it is found from the image's own directory.
	args := []string{"convert", "-f", "raw", "-O", k.format.Name()}
	for _, option := range strings.Fields(options) {
		args = append(args, strings.ReplaceAll(option, "DATA", "x.data"))
	}
	run(t, d.path, "qemu-img", append(args, raw, k.fileName())...)

	probed := k.format
	if k.format.Name() != "raw" {
		probed = nil
	}
	img := d.open(t, k.fileName(), probed, vfs.ReadOnly, nil)
	if got := img.Layers()[0].Format; got != k.format.Name() {
		t.Errorf("it is taken for %s", got)
	}
	got := readAll(t, img)
	img.Close()
	if int64(len(got)) < int64(len(want)) || !bytes.Equal(got[:len(want)], want) || len(bytes.Trim(got[len(want):], "\x00")) > 0 {
		t.Fatal("we read other bytes than qemu-img has written")
	}
	k.figures().ReadTheirs.Add(1)
	d.checkOurs(t, k, k.fileName(), true, nil)
	changeTheirs(t, d, k, r, got)
}

// changeTheirs writes to an image of qemu-img's, if such can be changed.
func changeTheirs(t *testing.T, d workDir, k kind, r *rand.Rand, want []byte) {
	t.Helper()
	img := d.open(t, k.fileName(), k.format, vfs.ReadWrite, nil)
	if img.Info().ReadOnly {
		img.Close()
		return
	}
	for i := range 60 {
		if err := changeOnce(img, r, want); err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
	}
	if got := readAll(t, img); !bytes.Equal(got, want) {
		t.Error("we read other bytes than we have written")
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	d.checkOurs(t, k, k.fileName(), true, nil)
	d.checkTheirs(t, k, k.fileName(), true)
	d.compareTheirs(t, k, k.fileName(), d.writeRaw(t, "changed.raw", want))
}

// changeOnce writes, zeroes, discards or flushes, and keeps want up to date.
func changeOnce(d block.Device, r *rand.Rand, want []byte) error {
	size := int64(len(want))
	off := r.Int64N(size)
	n := min(1+r.Int64N(100<<10), size-off)
	at := want[off : off+n]
	switch r.IntN(8) {
	case 0:
		clear(at)
		return d.WriteZeroes(off, n, 0)
	case 1:
		if err := d.Discard(off, n); err != nil {
			return err
		}
		_, err := d.ReadAt(at, off) // it may be what was there, or zeroes
		return err
	case 2:
		return d.Flush()
	}
	for i := range at {
		at[i] = byte(1 + r.IntN(255))
	}
	_, err := d.WriteAt(at, off)
	return err
}

// Overlays that qemu-img makes read as their chain does, on parents of the formats that
// they can name.
func TestTheirs_Overlays(t *testing.T) {
	for _, c := range []struct{ format, parent string }{
		{"vmdk", "vmdk"}, {"qcow", "qcow"}, {"qcow", "raw"}, {"qcow2", "qcow2"}, {"qcow2", "raw"}, {"qcow2", "vmdk"}, {"qcow2", "vdi"}, {"qcow2", "vhdx"},
	} {
		format, err := formats.Lookup(c.format)
		parent, parentErr := formats.Lookup(c.parent)
		if err = errors.Join(err, parentErr); err != nil {
			continue
		}
		t.Run(fmt.Sprintf("%s on %s", c.format, c.parent), func(t *testing.T) {
			r := testenv.Rand(t)
			d := newWorkDir(t)
			k := kind{format, ""}
			if o := format.Options(); len(o.OverlaySubformats) > 0 {
				k.subformat = o.OverlaySubformats[0]
			}
			want := randomDisk(r, 3<<20)
			run(t, d.path, "qemu-img", "convert", "-f", "raw", "-O", c.parent, d.writeRaw(t, "want.raw", want), "parent."+c.parent)
			run(t, d.path, "qemu-img", "create", "-f", c.format, "-b", "parent."+c.parent, "-F", c.parent, k.fileName())
			run(t, d.path, "qemu-io", "-f", c.format, "-c", "write -P 7 100000 200000", "-c", "write -P 9 2000000 70000", k.fileName())
			copy(want[100000:], bytes.Repeat([]byte{7}, 200000))
			copy(want[2000000:], bytes.Repeat([]byte{9}, 70000))
			img := d.open(t, k.fileName(), format, vfs.ReadOnly, nil)
			if got := readAll(t, img); !bytes.Equal(got, want) {
				t.Error("we read other bytes than qemu-io has written")
			}
			if got := img.Layers()[1].Format; got != parent.Name() {
				t.Errorf("its parent is taken for %s", got)
			}
			img.Close()
			k.figures().ReadTheirs.Add(1)
			changeTheirs(t, d, k, r, want)
		})
	}
}
