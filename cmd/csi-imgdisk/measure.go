package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// measurement has the fields of `qemu-img measure --output=json`.
type measurement struct {
	Required       int64 `json:"required"`
	FullyAllocated int64 `json:"fully-allocated"`
}

func newMeasureCommand() *cobra.Command {
	var how access
	var s shape
	var size sizeValue
	cmd := &cobra.Command{
		Use:   "measure (FILE | --size SIZE)",
		Short: "Say how much space an image would take in some format",
		Long: `Says how long the files of a new image will be: after FILE was converted to it, and once
everything in it has been written. Of FILE counts what is allocated; zeroes in it and
compression make the new image smaller. With -o json the fields are those of qemu-img measure.`,
		Example: `  csi-imgdisk image measure -O qcow2 disk.vmdk
  csi-imgdisk image measure -O vmdk --size 10Gi`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (size != 0) {
				return errors.New("give either an image or --size")
			}
			var src block.Device
			if len(args) == 1 {
				img, err := how.open(cmd.Context(), args[0], vfs.ReadOnly)
				if err != nil {
					return err
				}
				defer img.release()
				src = img
			}
			m, err := measure(cmd, s, int64(size), src)
			if err != nil {
				return err
			}
			return emit(cmd, m, func(p *printer) {
				p.line("required:        %s (%d bytes)", humanSize(m.Required), m.Required)
				p.line("fully allocated: %s (%d bytes)", humanSize(m.FullyAllocated), m.FullyAllocated)
			})
		},
	}
	how.addRootFlag(cmd)
	how.addChainFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	cmd.Flags().BoolVarP(&how.forceShare, "force-share", "U", false, "do not mind that somebody else writes the image")
	s.addLayoutFlags(cmd, "O")
	cmd.Flags().Lookup("target-format").Usage = "the new image's format (default raw)"
	cmd.Flags().StringVar(&s.preallocation, "preallocation", "", "space taken at once: off, metadata, falloc or full")
	cmd.Flags().Var(&size, "size", "guest size of an empty image")
	return cmd
}

func measure(cmd *cobra.Command, s shape, size int64, src block.Device) (measurement, error) {
	if s.format == "" {
		s.format = "raw"
	}
	format, err := formats.Lookup(s.format)
	if err != nil {
		return measurement{}, err
	}
	req, err := s.request(&location{}, format, size)
	if err != nil {
		return measurement{}, err
	}
	m, err := formats.Measure(cmd.Context(), format, req, src)
	return measurement{m.RequiredBytes, m.FullyAllocatedBytes}, err
}
