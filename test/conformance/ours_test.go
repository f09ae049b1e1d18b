package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// notByQEMU says why QEMU 7.2 does not read a variant, "" if it does.
func notByQEMU(k kind, v variant) string {
	const qemuVDIBlock = 1 << 20
	switch {
	case k.format.Name() == "vdi" && v.req.ClusterBytes != 0 && v.req.ClusterBytes != qemuVDIBlock:
		return "QEMU knows VDI with blocks of 1 MiB only"
	case k.format.Name() == "vhdx" && v.req.Extra["logical_sector_size"] == "4096":
		return "QEMU knows VHDX with sectors of 512 bytes only"
	}
	return ""
}

// Images that we make are found sound by our check and qemu-img's, and qemu-img reads from
// them what was put in.
func TestOurs_QEMU(t *testing.T) {
	for _, k := range bases() {
		t.Run(k.String(), func(t *testing.T) {
			r := testenv.Rand(t)
			for _, v := range k.variants() {
				t.Run(v.name, func(t *testing.T) { checkOurImage(t, k, v, randomDisk(r, k.size(r))) })
			}
		})
	}
}

// variant is a way to make an image of a kind.
type variant struct {
	name     string
	req      formats.CreateRequest
	compress bool
}

// variants returns ways to make images of a kind: each option on its own.
func (k kind) variants() []variant {
	o := k.format.Options()
	plain := formats.CreateRequest{Subformat: k.subformat}
	list := []variant{{name: "default", req: plain}, {name: "compressed", req: plain, compress: true}}
	for size := o.MinClusterBytes; size > 0 && size <= min(o.MaxClusterBytes, 4<<20); size *= 4 {
		v := variant{name: fmt.Sprintf("clusters of %d", size), req: plain}
		v.req.ClusterBytes = size
		list = append(list, v)
	}
	for _, p := range o.Preallocations {
		v := variant{name: "preallocation " + string(p), req: plain}
		v.req.Preallocation = p
		list = append(list, v)
	}
	for _, extra := range o.Extra {
		for _, value := range extra.Values {
			v := variant{name: extra.Name + "=" + value, req: plain}
			v.req.Extra = map[string]string{extra.Name: value}
			list = append(list, v)
		}
	}
	return list
}

// size returns a guest size of some MiB, as odd as the format can have.
func (k kind) size(r *rand.Rand) int64 {
	return formats.RoundSize(k.format, 2<<20+512*r.Int64N(4096))
}

// convert makes an image with contents; it skips the test if the kind has no such.
func (d workDir) convert(t *testing.T, k kind, v variant, want []byte) {
	t.Helper()
	d.writeRaw(t, "want.raw", want)
	source := d.open(t, "want.raw", mustLookup(t, "raw"), vfs.ReadOnly, nil)
	defer source.Close()
	req := v.req
	req.FS, req.Name, req.SizeBytes = d.fs, k.fileName(), int64(len(want))
	conversion := formats.Conversion{Copying: formats.Copying{Compress: v.compress}}
	err := conversion.Convert(context.Background(), source, k.format, req, nil)
	if errors.Is(err, block.ErrUnsupported) || errors.Is(err, block.ErrInvalid) {
		t.Skipf("not for this kind: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.figures().Created.Add(1)
}

func mustLookup(t *testing.T, name string) formats.Format {
	t.Helper()
	f, err := formats.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func checkOurImage(t *testing.T, k kind, v variant, want []byte) {
	d := newWorkDir(t)
	d.convert(t, k, v, want)
	d.checkOurs(t, k, k.fileName(), false, nil)
	img := d.open(t, k.fileName(), k.format, vfs.ReadOnly, nil)
	if got := readAll(t, img); !bytes.Equal(got, want) {
		t.Error("we read other bytes than we have written")
	}
	img.Close()
	if why := notByQEMU(k, v); why != "" {
		t.Skip(why)
	}
	d.checkTheirs(t, k, k.fileName(), false)
	d.compareTheirs(t, k, k.fileName(), d.join("want.raw"))
}

// reader is another program that reads images.
type reader struct {
	name string
	// formats are those that it reads; not, kinds of them that it does not, and why.
	formats []string
	not     map[string]string
	// read returns what it reads of an image.
	read func(t *testing.T, d workDir, file string) ([]byte, error)
}

var readers = []reader{
	{
		name: "7z", formats: []string{"vmdk", "vhdx", "vdi", "vpc", "qcow", "qcow2"}, read: readBy7z,
		not: map[string]string{"vmdk/vmfsSparse": "7-Zip knows no COWD extents"},
	},
	{
		name: "vmdkmount", formats: []string{"vmdk"}, read: readMounted("vmdkmount", "vmdk1"),
		not: map[string]string{
			"vmdk/monolithicFlat": "libvmdk 20200926 refuses the type monolithicFlat, QEMU's, too",
		},
	},
	{name: "vhdimount", formats: []string{"vhdx", "vpc"}, read: readMounted("vhdimount", "vhdi1")},
	{name: "qcowmount", formats: []string{"qcow", "qcow2"}, read: readMounted("qcowmount", "qcow1")},
}

func readBy7z(t *testing.T, d workDir, file string) ([]byte, error) {
	return exec.Command(testenv.Oracle(t, "7z"), "x", "-so", d.join(file)).Output()
}

// readMounted returns a function that reads images by mounting them with a program of
// libyal's, which shows the disk as a file.
func readMounted(program, disk string) func(t *testing.T, d workDir, file string) ([]byte, error) {
	return func(t *testing.T, d workDir, file string) ([]byte, error) {
		path := testenv.Oracle(t, program)
		if _, err := os.Stat("/dev/fuse"); err != nil {
			t.Skip("no FUSE")
		}
		at := d.join("mounted")
		if err := os.MkdirAll(at, 0o700); err != nil {
			return nil, err
		}
		cmd := exec.Command(path, file, at) // they take extents from the working directory
		cmd.Dir = d.path
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, out)
		}
		defer run(t, "", "umount", at)
		return os.ReadFile(filepath.Join(at, disk))
	}
}

// Programs that share no code with QEMU read from our images what was put in.
func TestOurs_OtherReaders(t *testing.T) {
	for _, k := range bases() {
		for _, p := range readers {
			if !slices.Contains(p.formats, k.format.Name()) {
				continue
			}
			t.Run(k.String()+"/"+p.name, func(t *testing.T) {
				if why := p.not[k.String()]; why != "" {
					t.Skip(why)
				}
				const size = 6 << 20 // whole clusters: they do not agree about the rest
				d := newWorkDir(t)
				want := randomDisk(testenv.Rand(t), size)
				d.convert(t, k, variant{req: formats.CreateRequest{Subformat: k.subformat}}, want)
				got, err := p.read(t, d, k.fileName())
				if err != nil {
					t.Fatalf("%s: %v", p.name, err)
				}
				if !bytes.Equal(got, want) {
					t.Fatalf("%s reads other bytes: %d, want %d", p.name, len(got), len(want))
				}
				k.figures().ReadByOthers.Add(1)
			})
		}
	}
}
