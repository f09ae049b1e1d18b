package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// conversion is what `image convert` reports.
type conversion struct {
	Source      string  `json:"source"`
	Filename    string  `json:"filename"`
	Format      string  `json:"format"`
	VirtualSize int64   `json:"virtual-size"`
	ActualSize  int64   `json:"actual-size"`
	Seconds     float64 `json:"seconds"`
}

func newConvertCommand() *cobra.Command {
	var how access
	var s shape
	var targetRoot string
	cmd := &cobra.Command{
		Use:   "convert SOURCE TARGET",
		Short: "Copy an image, with all it stands on, into a new image of another format",
		Long: `Copies what the guest sees of an image into a new one. Zeroes take no space in the new
image, unless --preallocation says otherwise. If it fails, nothing is left of the target.`,
		Example: "  csi-imgdisk image convert export.vmdk disk.raw",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			result, err := convert(cmd.Context(), how, s, args[0], args[1], targetRoot)
			if err != nil {
				return err
			}
			return emit(cmd, result, func(p *printer) {
				p.line("%s: %s, %s, takes %s, made in %.1f s", result.Filename, result.Format,
					humanSize(result.VirtualSize), humanSize(result.ActualSize), result.Seconds)
			})
		},
	}
	how.addRootFlag(cmd)
	how.addFormatFlag(cmd, "source-format", "f", "the source's format; found out from its contents if not given")
	cmd.Flags().BoolVarP(&how.forceShare, "force-share", "U", false, "do not mind that somebody else writes the source: the copy may be inconsistent")
	cmd.Flags().StringVar(&targetRoot, "target-root", "", "directory in which the target must lie; by default its store's, or its own")
	s.addFlags(cmd, "format", "F")
	return cmd
}

func convert(ctx context.Context, how access, s shape, source, target, targetRoot string) (conversion, error) {
	start := time.Now()
	src, err := how.open(ctx, source, vfs.ReadOnly)
	if err != nil {
		return conversion{}, err
	}
	defer src.release()
	at, err := locate(target, targetRoot)
	if err != nil {
		return conversion{}, err
	}
	defer at.close()
	format, err := s.resolve(at.name)
	if err != nil {
		return conversion{}, err
	}
	req, err := s.request(at, format, 0)
	if err != nil {
		return conversion{}, err
	}
	progress, end := startProgress("converting")
	err = formats.Convert(ctx, src, format, req, progress)
	end()
	if err != nil {
		return conversion{}, err
	}
	infos, err := describeChain(ctx, access{root: targetRoot, format: format.Name()}, target, false)
	if err != nil {
		return conversion{}, err
	}
	return conversion{
		Source: source, Filename: target, Format: format.Name(),
		VirtualSize: infos[0].VirtualSize, ActualSize: infos[0].ActualSize,
		Seconds: time.Since(start).Seconds(),
	}, nil
}
