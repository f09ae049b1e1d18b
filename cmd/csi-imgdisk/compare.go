package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Exit codes of `image compare`, which are qemu-img's.
const (
	compareDiffers    = 1
	compareOpenFailed = 2
	compareMapFailed  = 3
	compareReadFailed = 4
)

// comparison is what `image compare` reports.
type comparison struct {
	Identical  bool                   `json:"identical"`
	Difference formats.DifferenceKind `json:"difference,omitempty"`
	Offset     *int64                 `json:"offset,omitempty"`
}

func newCompareCommand() *cobra.Command {
	var a, b access
	var strict, share bool
	cmd := &cobra.Command{
		Use:   "compare FILE1 FILE2",
		Short: "Find out whether two images have the same contents",
		Long: `Finds the first byte in which two images differ for a guest. Past the end of the smaller
one the larger must be zero.

Exit codes: 0 identical, 1 different, 2 an image could not be opened, 3 its allocation
could not be found out, 4 it could not be read.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(2)(cmd, args); err != nil {
				return &exitError{compareOpenFailed, err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			a.forceShare, b.forceShare, b.root = share, share, a.root
			b.chainFormat = a.chainFormat
			d, err := compare(cmd, a, b, args, strict)
			if err != nil {
				return err
			}
			return reportComparison(cmd, d)
		},
	}
	a.addRootFlag(cmd)
	a.addChainFlag(cmd)
	a.addFormatFlag(cmd, "format", "f", "the first image's format; found out from its contents if not given")
	b.addFormatFlag(cmd, "second-format", "F", "the second image's format; found out from its contents if not given")
	a.addSecretFlag(cmd, "secret-file")
	b.addSecretFlag(cmd, "second-secret-file")
	addProgressFlag(cmd)
	cmd.Flags().BoolVarP(&strict, "strict", "s", false, "sizes and allocation must be the same, too")
	cmd.Flags().BoolVarP(&share, "force-share", "U", false, "do not mind that somebody else writes the images")
	return cmd
}

func compare(cmd *cobra.Command, a, b access, paths []string, strict bool) (formats.Difference, error) {
	ctx := cmd.Context()
	first, err := a.open(ctx, paths[0], vfs.ReadOnly)
	if err != nil {
		return formats.Difference{}, &exitError{compareOpenFailed, err}
	}
	defer first.release()
	second, err := b.open(ctx, paths[1], vfs.ReadOnly)
	if err != nil {
		return formats.Difference{}, &exitError{compareOpenFailed, err}
	}
	defer second.release()
	progress, end := startProgress(cmd, "comparing", inBytes)
	d, err := formats.Compare(ctx, first, second, strict, progress)
	end()
	if failed := (*formats.CompareError)(nil); errors.As(err, &failed) {
		code := compareReadFailed
		if failed.Mapping {
			code = compareMapFailed
		}
		return d, &exitError{code, err}
	}
	return d, err
}

func reportComparison(cmd *cobra.Command, d formats.Difference) error {
	result := comparison{Identical: d.Kind == "", Difference: d.Kind}
	if !result.Identical {
		result.Offset = &d.Off
	}
	err := emit(cmd, result, func(p *printer) {
		switch d.Kind {
		case "":
			p.line("identical")
		case formats.DifferentSize:
			p.line("different sizes: one ends at %d", d.Off)
		default:
			p.line("different %s at guest offset %d (%s)", d.Kind, d.Off, fmt.Sprintf("%#x", d.Off))
		}
	})
	if err == nil && !result.Identical {
		err = &exitError{code: compareDiffers}
	}
	return err
}
