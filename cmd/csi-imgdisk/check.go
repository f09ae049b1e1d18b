package main

import (
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
	CorruptionsFixed   int64    `json:"corruptions-fixed,omitempty"`
	LeaksFixed         int64    `json:"leaks-fixed,omitempty"`
	Filename           string   `json:"filename"`
	Format             string   `json:"format"`
	Problems           []string `json:"problems,omitempty"`
	Repairs            []string `json:"repairs,omitempty"`
}

func newCheckCommand() *cobra.Command {
	var how access
	var repair bool
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Examine all of an image's tables",
		Long: `Examines all tables of one image, not of what it stands on. With -o json the fields are
those of qemu-img check.

Exit codes: 0 nothing wrong, 1 the check could not be completed, 2 the image is corrupt,
3 it has leaks (space that nothing refers to) and is otherwise good, 63 the format has
nothing to check.

With --repair, what was found is fixed as far as no good data is touched, and the image is
checked once more: the result and the exit code say what is left.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := check(cmd, how, args[0], repair)
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
	addProgressFlag(cmd)
	cmd.Flags().BoolVar(&repair, "repair", false, "fix what can be fixed without touching good data, and give lost space back")
	return cmd
}

// check examines an image. What was repaired is examined again: the report says what is
// left, and what was fixed.
func check(cmd *cobra.Command, how access, path string, repair bool) (checkReport, error) {
	report, err := checkOnce(cmd, how, path, repair)
	if err != nil || report.CorruptionsFixed+report.LeaksFixed == 0 {
		return report, err
	}
	how.format = report.Format
	again, err := checkOnce(cmd, how, path, false)
	if err != nil {
		return report, err
	}
	again.CorruptionsFixed, again.LeaksFixed = report.CorruptionsFixed, report.LeaksFixed
	again.Repairs = report.Repairs
	return again, nil
}

func checkOnce(cmd *cobra.Command, how access, path string, repair bool) (checkReport, error) {
	layer, err := how.openLayer(path, repair)
	if err != nil {
		return checkReport{}, err
	}
	defer layer.close()
	unchecked := &exitError{checkUnsupported, fmt.Errorf("a %s image has nothing to check", layer.Format)}
	if layer.hasNoTables {
		return checkReport{}, unchecked
	}
	progress, end := startProgress(cmd, "checking", inTables)
	result, err := engine.Check(cmd.Context(), layer.Layer, repair, progress)
	end()
	switch {
	case errors.Is(err, block.ErrUnsupported):
		return checkReport{}, unchecked
	case err != nil:
		return checkReport{}, &exitError{checkFailed, err}
	}
	return newCheckReport(path, layer.Format, result), nil
}

// openedLayer is one image opened by itself, for looking at its tables.
type openedLayer struct {
	*engine.Layer
	at          *location
	hasNoTables bool // of its format
}

func (l *openedLayer) close() {
	_ = l.Layer.Close() // repairs were synced when they were made
	l.at.close()
}

// openLayer opens an image without what it stands on, for writing if it is to be
// repaired.
func (a *access) openLayer(path string, write bool) (*openedLayer, error) {
	at, err := locate(path, a.root)
	if err != nil {
		return nil, err
	}
	layer, err := a.openLayerAt(at, write)
	if err != nil {
		at.close()
		return nil, a.explain(at.explain(err))
	}
	return layer, nil
}

func (a *access) openLayerAt(at *location, write bool) (*openedLayer, error) {
	if err := a.settleFormat(at); err != nil {
		return nil, err
	}
	format, err := formats.Lookup(a.format)
	if err != nil {
		return nil, err
	}
	req := formats.OpenRequest{FS: at.fs, Name: at.name, Mode: vfs.ReadOnly, NoLock: a.forceShare && !write, Secret: a.anySecret(), Alone: true}
	if write {
		req.Mode = vfs.ReadWrite
	}
	layer, err := format.Open(req)
	if err != nil {
		return nil, err
	}
	return &openedLayer{layer, at, format.Options().MaxClusterBytes == 0}, nil
}

func newCheckReport(path, format string, result engine.CheckResult) checkReport {
	report := checkReport{
		ImageEndOffset: result.ImageEndOffset, TotalClusters: result.TotalClusters,
		AllocatedClusters: result.AllocatedCount, FragmentedClusters: result.Fragmented,
		CompressedClusters: result.Compressed, Corruptions: result.Corruptions,
		Leaks: result.Leaks, CorruptionsFixed: result.FixedProblems, LeaksFixed: result.FixedLeaks, Filename: path, Format: format,
	}
	for _, problem := range result.Problems {
		if problem.Fixed {
			report.Repairs = append(report.Repairs, problem.Text)
		} else {
			report.Problems = append(report.Problems, problem.Text)
		}
	}
	return report
}

func (r *checkReport) print(p *printer) {
	if r.CorruptionsFixed+r.LeaksFixed > 0 {
		p.line("repaired: %d corruptions, %d leaks", r.CorruptionsFixed, r.LeaksFixed)
		for _, problem := range r.Repairs {
			p.line("  %s", problem)
		}
	}
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
