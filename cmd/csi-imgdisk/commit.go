package main

import (
	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func newCommitCommand() *cobra.Command {
	var how access
	var base string
	var drop bool
	cmd := &cobra.Command{
		Use:   "commit FILE",
		Short: "Write what an overlay holds into the image it stands on",
		Long: `Writes what an overlay holds into its parent, which then reads as the overlay does, and
empties the overlay. The parent is durable before anything of the overlay goes, so this can
be interrupted and repeated. Other overlays on the same parent read differently afterwards:
formats with links that notice (VMDK, VHDX, VDI, VHD) then refuse them.

With --base it is written into an image further down; FILE and what lies between are left as
they are, and must not be used any more.`,
		Example: `  csi-imgdisk image commit overlay.vmdk
  csi-imgdisk image commit --drop overlay.vmdk && rm overlay.vmdk`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			into, err := commit(cmd, how, args[0], base, drop)
			if err != nil {
				return err
			}
			result := map[string]any{"filename": args[0], "base": into, "emptied": !drop && base == ""}
			return emit(cmd, result, func(p *printer) { p.line("%s was written into %s", args[0], into) })
		},
	}
	how.addRootFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	cmd.Flags().StringVarP(&base, "base", "b", "", "image to write into; by default the one that FILE stands on")
	cmd.Flags().BoolVarP(&drop, "drop", "d", false, "do not empty FILE: it is going to be removed")
	addProgressFlag(cmd)
	return cmd
}

// commit returns the path of the image that was written into.
func commit(cmd *cobra.Command, how access, path, base string, drop bool) (string, error) {
	at, err := locate(path, how.root)
	if err != nil {
		return "", err
	}
	defer at.close()
	m := formats.Committing{Open: how.options(vfs.ReadWrite), Keep: drop || base != ""}
	if base != "" {
		if m.Base, err = (&parentFlags{path: base}).name(at); err != nil {
			return "", err
		}
	}
	progress, end := startProgress(cmd, "committing", inBytes)
	into, err := formats.Commit(cmd.Context(), at.fs, at.name, m, progress)
	end()
	if err != nil {
		return "", how.explain(at.explain(err))
	}
	return at.hostPath(path, into), nil
}
