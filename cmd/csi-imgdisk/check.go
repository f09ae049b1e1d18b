package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Exit codes of `image check`, which are qemu-img's.
const (
	checkFailed      = 1
	checkCorrupt     = 2
	checkLeaks       = 3
	checkUnsupported = 63
)

// checkReport has the fields of `qemu-img check --output=json`, and the sentences.
type checkReport struct {
	ImageEndOffset     int64    `json:"image-end-offset,omitempty"`
	TotalClusters      int64    `json:"total-clusters,omitempty"`
	AllocatedClusters  int64    `json:"allocated-clusters,omitempty"`
	FragmentedClusters int64    `json:"fragmented-clusters,omitempty"`
	CompressedClusters int64    `json:"compressed-clusters,omitempty"`
	CheckErrors        int64    `json:"check-errors"`
	Corruptions        int64    `json:"corruptions,omitempty"`
	Leaks              int64    `json:"leaks,omitempty"`
	Filename           string   `json:"filename"`
	Format             string   `json:"format"`
	Problems           []string `json:"problems,omitempty"`
}

func newCheckCommand() *cobra.Command {
	var how access
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Examine all of an image's tables",
		Long: `Examines all tables of one image, not of what it stands on. With -o json the fields are
those of qemu-img check.

Exit codes: 0 nothing wrong, 1 the check could not be completed, 2 the image is corrupt,
3 it has leaks (space that nothing refers to) and is otherwise good, 63 the format has
nothing to check.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := check(cmd.Context(), how, args[0])
			if err != nil {
				return err
			}
			if err := emit(cmd, report, func(p *printer) { report.print(p) }); err != nil {
				return err
			}
			return report.verdict()
		},
	}
	how.addFlags(cmd)
	return cmd
}

func check(ctx context.Context, how access, path string) (checkReport, error) {
	img, err := how.openWith(ctx, path, formats.OpenOptions{
		Format: how.format, Mode: vfs.ReadOnly, NoLock: how.forceShare, NoParents: true,
	})
	if err != nil {
		return checkReport{}, err
	}
	defer img.close()
	unchecked := &exitError{checkUnsupported, fmt.Errorf("a %s image has nothing to check", img.formatName())}
	if format, err := formats.Lookup(img.formatName()); err == nil && format.Options().MaxClusterBytes == 0 {
		return checkReport{}, unchecked
	}
	progress, end := startProgress("checking")
	result, err := img.Layers()[0].Codec.Check(ctx, nil, progress)
	end()
	switch {
	case errors.Is(err, block.ErrUnsupported):
		return checkReport{}, unchecked
	case err != nil:
		return checkReport{}, &exitError{checkFailed, err}
	}
	return newCheckReport(path, img.formatName(), result), nil
}

func newCheckReport(path, format string, result engine.CheckResult) checkReport {
	report := checkReport{
		ImageEndOffset: result.ImageEndOffset, TotalClusters: result.TotalClusters,
		AllocatedClusters: result.AllocatedCount, FragmentedClusters: result.Fragmented,
		CompressedClusters: result.Compressed, Corruptions: result.Corruptions,
		Leaks: result.Leaks, Filename: path, Format: format,
	}
	for _, problem := range result.Problems {
		report.Problems = append(report.Problems, problem.Text)
	}
	return report
}

func (r *checkReport) print(p *printer) {
	for _, problem := range r.Problems {
		p.line("%s", problem)
	}
	switch {
	case r.Corruptions > 0:
		p.line("%s is corrupt: %d corruptions, %d leaks", r.Filename, r.Corruptions, r.Leaks)
	case r.Leaks > 0:
		p.line("%s has %d leaks: space that nothing refers to; its data is good", r.Filename, r.Leaks)
	default:
		p.line("%s is good", r.Filename)
	}
	if r.TotalClusters > 0 {
		p.line("%d of %d clusters allocated (%.1f %%), %d compressed",
			r.AllocatedClusters, r.TotalClusters, 100*float64(r.AllocatedClusters)/float64(r.TotalClusters), r.CompressedClusters)
	}
}

// verdict is the exit code for what was found.
func (r *checkReport) verdict() error {
	switch {
	case r.Corruptions > 0:
		return &exitError{code: checkCorrupt}
	case r.Leaks > 0:
		return &exitError{code: checkLeaks}
	}
	return nil
}
