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
	var shrink bool
	var less string
	cmd := &cobra.Command{
		Use:   "resize FILE SIZE|+SIZE|-SIZE",
		Short: "Make an image larger or smaller",
		Long: `Gives an image another size: SIZE, or SIZE more or less than now. What is added reads as
zeroes. An image becomes smaller when nothing is lost, because its end holds no data, or
when --shrink allows that what is there is lost for good. Sizes are rounded up to what the
format can have.`,
		Example: `  csi-imgdisk image resize disk.vmdk +10G
  csi-imgdisk image resize disk.vmdk 20G --shrink`,
		Args: func(cmd *cobra.Command, args []string) error {
			if less != "" {
				args = append(args, less)
			}
			return cobra.ExactArgs(2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			args = append(args, less)
			img, err := how.open(cmd.Context(), args[0], vfs.ReadWrite)
			if err != nil {
				return err
			}
			before := img.Info().SizeBytes
			err = resize(img, args[1], shrink)
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
	how.addChainFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	cmd.Flags().BoolVar(&shrink, "shrink", false, "let data at the end be lost")
	acceptMinus(cmd, &less)
	return cmd
}

// acceptMinus takes an argument such as -10G, which looks like a flag, for what it is: to
// the parser of flags each digit is one, whose value is the rest.
func acceptMinus(cmd *cobra.Command, argument *string) {
	for digit := '1'; digit <= '9'; digit++ {
		name := "minus-" + string(digit)
		cmd.Flags().VarP(&minusValue{digit: string(digit), argument: argument}, name, string(digit), "")
		_ = cmd.Flags().MarkHidden(name) // it is there
	}
}

type minusValue struct {
	digit    string
	argument *string
}

// String implements pflag.Value.
func (v *minusValue) String() string { return "" }

// Type implements pflag.Value.
func (v *minusValue) Type() string { return "size" }

// Set implements pflag.Value.
func (v *minusValue) Set(rest string) error {
	*v.argument = "-" + v.digit + rest
	return nil
}

func resize(img *openedImage, text string, shrink bool) error {
	now := img.Info().SizeBytes
	size, err := newSize(text, now)
	if err != nil {
		return err
	}
	format, err := formats.Lookup(img.formatName())
	if err != nil {
		return err
	}
	size = formats.RoundSize(format, size)
	if size >= now {
		return img.Resize(size)
	}
	if !shrink {
		if err := checkUnused(img, size, now); err != nil {
			return err
		}
	}
	return img.Shrink(size)
}

// newSize returns the size that a person asks for, given the present one.
func newSize(text string, now int64) (int64, error) {
	number := strings.TrimLeft(text, "+-")
	size, err := driver.ParseSize(number)
	if err != nil || len(text)-len(number) > 1 {
		return 0, fmt.Errorf("size %q: %w: want a number of bytes, or one with K, M, G or T, after + or - if it is meant so", text, block.ErrInvalid)
	}
	switch text[0] {
	case '+':
		if size > math.MaxInt64-now {
			return 0, fmt.Errorf("size %s: %w: too large", text, block.ErrInvalid)
		}
		return now + size, nil
	case '-':
		size = now - size
	}
	if size <= 0 {
		return 0, fmt.Errorf("size %s: %w: nothing would be left of %d bytes", text, block.ErrInvalid, now)
	}
	return size, nil
}

// checkUnused reports whether guest bytes from one offset to another hold data.
func checkUnused(img *openedImage, off, end int64) error {
	for off < end {
		extent, err := img.Map(off, end-off)
		if err != nil {
			return err
		}
		if extent.State == block.Data {
			return fmt.Errorf("there is data at guest offset %d, past the new end: --shrink lets it be lost", off)
		}
		off += extent.Len
	}
	return nil
}
