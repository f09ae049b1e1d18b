package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func newStoreCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Make and look after directories that hold volumes",
	}
	cmd.AddCommand(
		newStoreInitCommand(), newStoreListCommand(), newStoreTreeCommand(),
		newStoreCheckCommand(), newStoreGCCommand(),
	)
	return cmd
}

// parseStore understands NAME=PATH.
func parseStore(flag string) (namedStore, error) {
	name, path, ok := strings.Cut(flag, "=")
	if !ok || name == "" || path == "" {
		return namedStore{}, fmt.Errorf("store %q: want NAME=PATH", flag)
	}
	abs, err := filepath.Abs(path)
	return namedStore{name, abs}, err
}

// storeAt names the store in a directory for messages.
func storeAt(path string) (namedStore, error) {
	abs, err := filepath.Abs(path)
	return namedStore{filepath.Base(abs), abs}, err
}

// withStore opens the store in a directory for the time of a call.
func withStore(ctx context.Context, path string, opts store.Options, use func(*openedStore) error) error {
	named, err := storeAt(path)
	if err != nil {
		return err
	}
	s, err := named.open(ctx, opts)
	if err != nil {
		return err
	}
	return errors.Join(use(s), s.Close())
}

func newStoreInitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "init PATH",
		Short: "Make a store of an existing directory",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := vfs.OpenDir(args[0])
			if err != nil {
				return err
			}
			defer dir.Close()
			id, err := store.Init(dir)
			if err != nil {
				return err
			}
			return emit(cmd, map[string]string{"id": id, "path": args[0]}, func(p *printer) {
				p.line("%s is a store, %s", args[0], id)
			})
		},
	}
}

// volumeRow is a volume as `store list` shows it.
type volumeRow struct {
	Name      string   `json:"name"`
	SizeBytes int64    `json:"size"`
	Format    string   `json:"format,omitempty"`
	Layers    int      `json:"layers"`
	Snapshots []string `json:"snapshots"`
	Nodes     []string `json:"nodes"`
	Created   string   `json:"created,omitempty"`
	State     string   `json:"state"` // ready, being made, deleted, or what is wrong
}

func newVolumeRow(entry store.VolumeEntry) volumeRow {
	if entry.Err != nil {
		return volumeRow{Name: entry.Name, Snapshots: []string{}, Nodes: []string{}, State: sentence(entry.Err)}
	}
	r := entry.Record
	row := volumeRow{
		Name: entry.Name, SizeBytes: r.SizeBytes, Format: r.Format, Layers: len(r.Layers),
		Snapshots: []string{}, Nodes: []string{}, Created: r.Created.Format(time.RFC3339), State: "ready",
	}
	for _, attachment := range r.Attachments {
		row.Nodes = append(row.Nodes, attachment.Node)
	}
	for _, snapshot := range r.Snapshots {
		row.Snapshots = append(row.Snapshots, snapshot.Name)
	}
	switch {
	case r.Deleted:
		row.State = "deleted, still needed"
	case !r.Ready:
		row.State = "being made"
	}
	return row
}

func newStoreListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list PATH",
		Short: "List a store's volumes",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStore(cmd.Context(), args[0], store.Options{ReadOnly: true}, func(s *openedStore) error {
				volumes, err := s.Volumes(cmd.Context())
				if err != nil {
					return err
				}
				rows := []volumeRow{}
				for _, entry := range volumes {
					rows = append(rows, newVolumeRow(entry))
				}
				return emit(cmd, rows, func(p *printer) { printVolumes(p, rows) })
			})
		},
	}
}

func printVolumes(p *printer, volumes []volumeRow) {
	if len(volumes) == 0 {
		p.line("no volumes")
		return
	}
	var rows [][]string
	for _, v := range volumes {
		rows = append(rows, []string{v.Name, humanSize(v.SizeBytes), v.Format, fmt.Sprint(v.Layers),
			orNone(strings.Join(v.Snapshots, ",")), orNone(strings.Join(v.Nodes, ",")), v.State})
	}
	p.table([]string{"VOLUME", "SIZE", "FORMAT", "LAYERS", "SNAPSHOTS", "NODES", "STATE"}, rows)
}

func orNone(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newStoreTreeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tree PATH",
		Short: "Draw which image stands on which",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStore(cmd.Context(), args[0], store.Options{ReadOnly: true}, func(s *openedStore) error {
				tree, err := s.Tree(cmd.Context())
				if err != nil {
					return err
				}
				return emit(cmd, tree, func(p *printer) { p.err = tree.Draw(p.out) })
			})
		},
	}
}

func newStoreCheckCommand() *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "check PATH",
		Short: "Examine a store's records and images",
		Long: `Examines all records and layers, and all images that are not in use.

Exit codes: 0 nothing wrong, 1 the check could not be completed, 2 data is in danger or
lost, 3 only space is wasted.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStore(cmd.Context(), args[0], store.Options{ReadOnly: !repair}, func(s *openedStore) error {
				report, err := s.Check(cmd.Context(), repair)
				if err != nil {
					return err
				}
				if err := emit(cmd, report, func(p *printer) { printStoreReport(p, report) }); err != nil {
					return err
				}
				return storeVerdict(report)
			})
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "remove orphans, and fix what can be fixed without touching good data")
	return cmd
}

func printStoreReport(p *printer, report store.CheckReport) {
	for _, problem := range report.Problems {
		var where []string
		for _, part := range []string{problem.Volume, problem.File} {
			if part != "" {
				where = append(where, part)
			}
		}
		fixed := ""
		if problem.Fixed {
			fixed = " (fixed)"
		}
		p.line("%s: %s%s", strings.Join(where, ", "), problem.Text, fixed)
	}
	for _, layer := range report.Skipped {
		p.line("%s: in use, not looked into", layer)
	}
	p.line("%d volumes, %d layers, %d problems", report.Volumes, report.Layers, len(report.Problems))
}

// storeVerdict is the exit code for what was found and not fixed.
func storeVerdict(report store.CheckReport) error {
	code := 0
	for _, problem := range report.Problems {
		switch {
		case problem.Fixed:
		case problem.Corrupt:
			return &exitError{code: checkCorrupt}
		default:
			code = checkLeaks
		}
	}
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

func newStoreGCCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "gc PATH",
		Short: "Remove what nothing in a store needs any more",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStore(cmd.Context(), args[0], store.Options{}, func(s *openedStore) error {
				result, err := s.GC(cmd.Context())
				if err != nil {
					return err
				}
				return emit(cmd, result, func(p *printer) {
					for _, list := range []struct {
						what  string
						names []string
					}{
						{"removed volume", result.RemovedVolumes}, {"removed", result.RemovedFiles},
						{"shortened", result.MergedVolumes}, {"problem:", result.Problems},
					} {
						for _, name := range list.names {
							p.line("%s %s", list.what, name)
						}
					}
					p.line("%d files removed, %d volumes shortened", len(result.RemovedFiles), len(result.MergedVolumes))
				})
			})
		},
	}
}
