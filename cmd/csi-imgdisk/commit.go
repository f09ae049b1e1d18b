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
empties the overlay, if its format can (not VDI). The parent is durable before anything of
the overlay goes, so this can be interrupted and repeated. Other overlays on the same parent
read differently afterwards: formats with links that notice (VMDK, VHDX, VDI, VHD) then refuse
them. If the machine crashes right at the start, such a link may have to be made anew, with
image rebase --unsafe; nothing is lost then.

With --base it is written into an image further down; FILE and what lies between are left as
they are, and must not be used any more.`,
		Example: `  csi-imgdisk image commit overlay.vmdk
  csi-imgdisk image commit --drop overlay.vmdk && rm overlay.vmdk`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			into, emptied, err := commit(cmd, how, args[0], base, drop)
			if err != nil {
				return err
			}
			result := map[string]any{"filename": args[0], "base": into, "emptied": emptied}
			return emit(cmd, result, func(p *printer) {
				what := "left as it is"
				if emptied {
					what = "emptied"
				}
				p.line("%s was written into %s, and %s", args[0], into, what)
			})
		},
	}
	how.addRootFlag(cmd)
	how.addChainFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	cmd.Flags().StringVarP(&base, "base", "b", "", "image to write into; by default the one that FILE stands on")
	cmd.Flags().BoolVarP(&drop, "drop", "d", false, "do not empty FILE: it is going to be removed")
	addProgressFlag(cmd)
	return cmd
}

// commit returns the path of the image that was written into, and whether the overlay holds
// nothing any more.
func commit(cmd *cobra.Command, how access, path, base string, drop bool) (into string, emptied bool, err error) {
	at, err := locate(path, how.root)
	if err != nil {
		return "", false, err
	}
	defer at.close()
	m := formats.Committing{Open: how.options(vfs.ReadWrite), Keep: drop || base != ""}
	if base != "" {
		if m.Base, err = (&parentFlags{path: base}).name(at); err != nil {
			return "", false, err
		}
	}
	progress, end := startProgress(cmd, "committing", inBytes)
	done, err := formats.Commit(cmd.Context(), at.fs, at.name, m, progress)
	end()
	if err != nil {
		return "", false, how.explain(at.explain(err))
	}
	return at.hostPath(path, done.Base), done.Emptied, nil
}
