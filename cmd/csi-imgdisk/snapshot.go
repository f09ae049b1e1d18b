package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func newSnapshotCommand() *cobra.Command {
	var how access
	var s shape
	var list bool
	internal := map[string]*string{"create": new(string), "apply": new(string), "delete": new(string)}
	cmd := &cobra.Command{
		Use:   "snapshot FILE [OVERLAY] | snapshot --list FILE",
		Short: "Keep an image as it is, and go on in an overlay; list internal snapshots",
		Long: `Makes OVERLAY, a new image that stands on FILE: FILE is a snapshot from then on and must
not be written any more; what is to change is OVERLAY. To go back to the snapshot, remove
OVERLAY; to remove the snapshot, write OVERLAY into it with image commit.

Snapshots inside an image (QCOW2) are listed with --list, and kept as they are when the image
is written. They are not made, applied or deleted here.`,
		Example: `  csi-imgdisk image snapshot disk.qcow2 disk-monday.qcow2
  csi-imgdisk image snapshot --list disk.qcow2`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			for verb, name := range internal {
				if *name != "" {
					return refuseInternal(verb, args[0])
				}
			}
			switch {
			case list && len(args) == 1:
				return listSnapshots(cmd, how, args[0])
			case list || len(args) == 1:
				return errors.New("give an image and a name for the overlay on it, or --list and an image")
			}
			return snapshot(cmd, how, s, args[0], args[1])
		},
	}
	how.addRootFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	s.addFlags(cmd, "O")
	cmd.Flags().BoolVarP(&list, "list", "l", false, "list the snapshots inside an image")
	for verb, name := range internal {
		cmd.Flags().StringVarP(name, verb, verb[:1], "", "")
		_ = cmd.Flags().MarkHidden(verb) // it is there
	}
	return cmd
}

func refuseInternal(verb, path string) error {
	return fmt.Errorf("%s a snapshot inside %s: %w: snapshots are overlays here, as in: csi-imgdisk image snapshot %s OVERLAY",
		verb, path, block.ErrUnsupported, path)
}

// snapshot makes an overlay of the image's own format, if none is asked for.
func snapshot(cmd *cobra.Command, how access, s shape, path, overlay string) error {
	at, err := locate(overlay, how.root)
	if err != nil {
		return err
	}
	defer at.close()
	on := parentFlags{path: path, format: how.format, secretFile: how.secretFile}
	if s.format == "" && filepath.Ext(overlay) == filepath.Ext(path) {
		below, err := locate(path, how.root)
		if err != nil {
			return err
		}
		defer below.close()
		own := access{format: how.format}
		if err := own.settleFormat(below); err != nil {
			return err
		}
		s.format = own.format
	}
	format, err := s.resolve(at.name)
	if err != nil {
		return err
	}
	req, err := s.request(at, format, 0)
	if err != nil {
		return err
	}
	if err := create(cmd.Context(), at, format, req, on); err != nil {
		return at.explain(err)
	}
	return reportCreated(cmd, overlay, access{root: how.root, format: format.Name()})
}

// listSnapshots shows what is inside an image.
func listSnapshots(cmd *cobra.Command, how access, path string) error {
	infos, err := describeChain(cmd.Context(), how, path, false)
	if err != nil {
		return err
	}
	found := infos[0].Snapshots
	if found == nil {
		found = []map[string]any{}
	}
	return emit(cmd, found, func(p *printer) {
		if len(found) == 0 {
			p.line("%s has no snapshots inside", path)
			return
		}
		p.table([]string{"ID", "NAME", "VM SIZE", "DATE"}, snapshotRows(found))
	})
}

func snapshotRows(snapshots []map[string]any) [][]string {
	var rows [][]string
	for _, s := range snapshots {
		vm, _ := s["vm-state-size"].(int64)
		date, _ := s["date-sec"].(int64)
		rows = append(rows, []string{
			fmt.Sprint(s["id"]), fmt.Sprint(s["name"]), humanSize(vm), time.Unix(date, 0).UTC().Format(time.DateTime),
		})
	}
	return rows
}
