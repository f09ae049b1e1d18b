// Command image makes the driver's container image without a container engine: an archive
// that `ctr images import`, `docker load` and `skopeo copy oci-archive:` take, and its
// software bill of materials (SPDX 2.3, JSON) beside it.
//
//	SOURCE_DATE_EPOCH=… go run ./image -rootfs DIR -binary bin/csi-imgdisk -name NAME:TAG -out csi-imgdisk.tar
//
// DIR is what image/rootfs.sh made; its compressed layer is kept as DIR.tar.gz. The same
// files make the same archive, to the bit.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/image/archive"
)

func main() {
	var b build
	flag.StringVar(&b.rootfs, "rootfs", "", "directory that image/rootfs.sh made")
	flag.StringVar(&b.binary, "binary", "bin/csi-imgdisk", "the program")
	flag.StringVar(&b.name, "name", "ghcr.io/csi-imgdisk/csi-imgdisk:dev", "the image's NAME:TAG")
	flag.StringVar(&b.out, "out", "csi-imgdisk.tar", "archive to write; the bill of materials is beside it as .spdx.json")
	flag.Parse()
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// build is an image to be made.
type build struct {
	rootfs, binary, name, out string
}

func (b build) run() error {
	if b.rootfs == "" {
		return errors.New("-rootfs is missing: make one with image/rootfs.sh")
	}
	epoch, err := sourceDate()
	if err != nil {
		return err
	}
	if err := b.writeArchive(epoch); err != nil {
		return fmt.Errorf("write %s: %w", b.out, err)
	}
	bom := strings.TrimSuffix(b.out, ".tar") + ".spdx.json"
	if err := writeBOM(b, epoch, bom); err != nil {
		return fmt.Errorf("write %s: %w", bom, err)
	}
	fmt.Printf("%s and %s\n", b.out, bom)
	return nil
}

// writeArchive writes an image of two layers: the root file system, which stays the same for
// many versions of the program, and the program.
func (b build) writeArchive(epoch time.Time) error {
	base, err := archive.KeptLayer(b.rootfs+".tar.gz", archive.Content{Root: b.rootfs})
	if err != nil {
		return fmt.Errorf("the root file system: %w", err)
	}
	layer := b.out + ".layer"
	defer os.Remove(layer)
	defer os.Remove(layer + ".json")
	top, err := archive.WriteLayer(layer, archive.Content{
		Files:  []archive.File{{Name: archive.DriverProgram, Mode: 0o755, From: b.binary}},
		Newest: epoch,
	})
	if err != nil {
		return fmt.Errorf("the program: %w", err)
	}
	return archive.Write(b.out, epoch, archive.Driver(b.name, base, top))
}

// sourceDate is when the image says that it was made.
func sourceDate() (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		return time.Unix(0, 0).UTC(), nil
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH %q: want seconds since 1970", text)
	}
	return time.Unix(seconds, 0).UTC(), nil
}
