package main

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func newResizeCommand() *cobra.Command {
	var how access
	cmd := &cobra.Command{
		Use:   "resize FILE [+]SIZE",
		Short: "Make an image larger",
		Long:  "Makes an image larger: to SIZE, or by it with a plus. What is added reads as zeroes.",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			img, err := how.open(cmd.Context(), args[0], vfs.ReadWrite)
			if err != nil {
				return err
			}
			before := img.Info().SizeBytes
			err = resize(img, args[1])
			after := img.Info().SizeBytes
			if err := errors.Join(err, img.close()); err != nil {
				return err
			}
			result := map[string]int64{"previous-size": before, "virtual-size": after}
			return emit(cmd, result, func(p *printer) {
				p.line("%s: %s (%d bytes), was %s", args[0], humanSize(after), after, humanSize(before))
			})
		},
	}
	how.addRootFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	return cmd
}

func resize(img *openedImage, text string) error {
	number, relative := strings.CutPrefix(text, "+")
	size, err := driver.ParseSize(number)
	if err != nil {
		return err
	}
	if now := img.Info().SizeBytes; relative {
		if size > math.MaxInt64-now {
			return fmt.Errorf("size %s: %w: too large", text, block.ErrInvalid)
		}
		size += now
	}
	format, err := formats.Lookup(img.formatName())
	if err != nil {
		return err
	}
	if m := format.Options().SizeMultiple; m > 1 && size%m != 0 {
		size += m - size%m
	}
	return img.Resize(size)
}
