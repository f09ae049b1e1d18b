package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// CheckProblem is one thing Check found.
type CheckProblem struct {
	Volume string `json:"volume,omitempty"`
	File   string `json:"file,omitempty"`
	Text   string `json:"text"`
	// Corrupt: data is in danger, or lost; else only space is.
	Corrupt bool `json:"corrupt"`
	Fixed   bool `json:"fixed"`
}

// CheckReport is what Check found.
type CheckReport struct {
	Volumes  int            `json:"volumes"`
	Layers   int            `json:"layers"`
	Skipped  []string       `json:"skipped"` // layers in use, which were not looked into
	Problems []CheckProblem `json:"problems"`
}

// Check examines records, layers, links and images. With repair it also removes what is
// left over, as GC does, and repairs the volumes' own layers where that touches no good
// data. Images that are in use are skipped.
func (s *Store) Check(ctx context.Context, repair bool) (CheckReport, error) {
	c := &checker{store: s, repair: repair, seen: map[string]bool{},
		report: CheckReport{Skipped: []string{}, Problems: []CheckProblem{}}}
	if repair {
		if err := s.writable(); err != nil {
			return c.report, err
		}
	}
	dirs, err := s.fs.ReadDir(volumesDir)
	if err != nil {
		return c.report, fmt.Errorf("list volumes: %w", err)
	}
	entries, err := s.records(ctx)
	if err != nil {
		return c.report, err
	}
	needed, err := (&scan{entries: entries}).neededLayers()
	if err != nil {
		needed = nil // the unreadable record is reported below; orphans cannot be told
	}
	for _, dir := range dirs {
		if err := ctx.Err(); err != nil {
			return c.report, err
		}
		c.directory(ctx, dir, needed)
	}
	return c.report, ctx.Err()
}

type checker struct {
	store  *Store
	repair bool
	seen   map[string]bool // layers that were looked into
	report CheckReport
}

func (c *checker) problem(p CheckProblem) {
	c.report.Problems = append(c.report.Problems, p)
}

// directory checks one entry of volumes/.
func (c *checker) directory(ctx context.Context, dir fs.DirEntry, needed map[string]bool) {
	name := dir.Name()
	if checkVolumeName(name) != nil || !dir.IsDir() {
		c.problem(CheckProblem{File: volumeDir(name), Text: "it is no volume's directory, and the store did not put it there"})
		return
	}
	rec, err := c.store.readRecord(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.leftOver(ctx, name, "a directory without a record: a creation or deletion was interrupted")
		return
	case err != nil:
		c.problem(CheckProblem{Volume: name, File: volumeFile(name, recordFile), Text: err.Error(), Corrupt: true})
		return
	case !rec.Ready && !rec.Deleted:
		c.leftOver(ctx, name, "it is still being made, or its creation was interrupted")
		return
	}
	if !rec.Deleted {
		c.report.Volumes++
		c.chain(ctx, rec)
	}
	for _, l := range rec.Layers {
		if !rec.Deleted || needed[l.File] {
			c.layer(ctx, rec, l)
		}
	}
	if needed != nil {
		c.orphans(ctx, name, needed)
	}
}

// leftOver reports a volume that never came to be, or is half gone.
func (c *checker) leftOver(ctx context.Context, name, text string) {
	p := CheckProblem{Volume: name, Text: text}
	if c.repair {
		var result GCResult
		err := c.store.collect(ctx, name, false, &result)
		p.Fixed = err == nil && len(result.RemovedVolumes) > 0
	}
	c.problem(p)
}

// chain checks that the images stand on each other as the record says.
func (c *checker) chain(ctx context.Context, rec Record) {
	top := rec.top()
	opts := formats.OpenOptions{Format: top.Format, Mode: vfs.ReadOnly, NoLock: true, ParentFormats: map[string]string{}}
	for _, l := range rec.Layers[:len(rec.Layers)-1] {
		opts.ParentFormats[l.File] = l.Format
	}
	img, err := formats.Open(ctx, c.store.fs, top.File, opts)
	if err != nil {
		c.problem(CheckProblem{Volume: rec.Name, File: top.File, Text: err.Error(), Corrupt: true})
		return
	}
	defer img.Close()
	if err := verifyChain(img, rec.Layers); err != nil {
		c.problem(CheckProblem{Volume: rec.Name, File: top.File, Text: err.Error(), Corrupt: true})
	}
	if size := img.Info().SizeBytes; size < rec.SizeBytes {
		c.problem(CheckProblem{Volume: rec.Name, File: top.File, Corrupt: true,
			Text: fmt.Sprintf("the image has %d bytes, the record says %d", size, rec.SizeBytes)})
	}
}

// layer checks one image, once.
func (c *checker) layer(ctx context.Context, rec Record, l LayerRecord) {
	if c.seen[l.File] {
		return
	}
	c.seen[l.File] = true
	c.report.Layers++
	result, err := checkImage(ctx, c.store.fs, l, false)
	if err == nil && len(result.Problems) > 0 && c.repairable(rec, l) {
		repaired, repairErr := repairImage(ctx, c.store.fs, l)
		if !errors.Is(repairErr, block.ErrLocked) { // else somebody has just opened it
			result, err = repaired, repairErr
		}
	}
	switch {
	case errors.Is(err, block.ErrLocked):
		c.report.Skipped = append(c.report.Skipped, l.File)
		return
	case err != nil:
		c.problem(CheckProblem{Volume: rec.Name, File: l.File, Text: err.Error(), Corrupt: true})
		return
	}
	for _, p := range result.Problems {
		c.problem(CheckProblem{Volume: rec.Name, File: l.File, Text: p.Text, Corrupt: p.Corrupt, Fixed: p.Fixed})
	}
}

// repairable reports whether a layer may be repaired: images are not ours, and a top that
// is being served may have its newest tables in a node's redo journal.
func (c *checker) repairable(rec Record, l LayerRecord) bool {
	return c.repair && ownerOf(l.File) != "" && (l != rec.top() || rec.serving() == "")
}

// repairImage repairs an image. Fixed is what a second look no longer finds.
func repairImage(ctx context.Context, fsys vfs.FS, l LayerRecord) (engine.CheckResult, error) {
	result, err := checkImage(ctx, fsys, l, true)
	if err != nil {
		return result, err
	}
	after, err := checkImage(ctx, fsys, l, false)
	for i := range result.Problems {
		text := result.Problems[i].Text
		result.Problems[i].Fixed = !slices.ContainsFunc(after.Problems, func(p engine.Problem) bool { return p.Text == text })
	}
	return result, err
}

// checkImage checks one image, and repairs it if that is wanted.
func checkImage(ctx context.Context, fsys vfs.FS, l LayerRecord, repair bool) (engine.CheckResult, error) {
	format, err := formats.Lookup(l.Format)
	if err != nil {
		return engine.CheckResult{}, err
	}
	mode := vfs.ReadOnly
	if repair {
		mode = vfs.ReadWrite
	}
	layer, err := format.Open(formats.OpenRequest{FS: fsys, Name: l.File, Mode: mode})
	if err != nil {
		return engine.CheckResult{}, err
	}
	result, err := engine.Check(ctx, layer, repair, func(int64, int64) {})
	return result, errors.Join(err, layer.Close())
}

// orphans reports files that nothing needs, and files that are not the store's.
func (c *checker) orphans(ctx context.Context, name string, needed map[string]bool) {
	unneeded, _, err := c.store.unneededFiles(name, needed)
	if err != nil {
		c.problem(CheckProblem{Volume: name, Text: err.Error(), Corrupt: true})
		return
	}
	fixed := false
	if c.repair && len(unneeded) > 0 {
		_, err := c.store.sweep(ctx, name)
		fixed = err == nil
	}
	for _, file := range unneeded {
		c.problem(CheckProblem{Volume: name, File: file, Text: "nothing needs this file", Fixed: fixed})
	}
	entries, err := c.store.fs.ReadDir(volumeDir(name))
	if err != nil {
		return // swept away with its volume
	}
	for _, entry := range entries {
		if _, ok := layerStem(name, entry.Name()); !ok && !isStoreFile(entry.Name()) {
			c.problem(CheckProblem{Volume: name, File: path.Join(volumeDir(name), entry.Name()), Text: "the store did not put this file here"})
		}
	}
}
