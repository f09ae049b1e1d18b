package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func newRebaseCommand() *cobra.Command {
	var how access
	var on parentFlags
	var flatten, unsafe bool
	cmd := &cobra.Command{
		Use:   "rebase FILE (--parent PARENT | --flatten)",
		Short: "Let an image stand on another one, or on none, and read the same",
		Long: `Lets an image stand on another parent. What it would read differently there is copied into
it first, so its contents stay the same, also if this is interrupted. With --flatten, or
--parent "", it stands on nothing afterwards.

With --unsafe only the link changes: for a parent that was moved or renamed. Neither is read,
and if the two do not have the same contents, the image is damaged.`,
		Example: `  csi-imgdisk image rebase overlay.vmdk --parent other.vmdk
  csi-imgdisk image rebase overlay.vmdk --flatten
  csi-imgdisk image rebase overlay.vmdk --unsafe --parent renamed.vmdk`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if given := cmd.Flags().Changed; flatten == (given("parent") || given("backing")) {
				return errors.New("give either --parent, or --flatten for none")
			}
			if err := rebase(cmd, how, on, args[0], unsafe); err != nil {
				return err
			}
			infos, err := describeChain(cmd.Context(), how, args[0], false)
			if err != nil {
				return err
			}
			return emit(cmd, infos[0], func(p *printer) {
				if link := infos[0].BackingFilename; link != "" {
					p.line("%s stands on %s", args[0], link)
				} else {
					p.line("%s stands on nothing", args[0])
				}
			})
		},
	}
	how.addRootFlag(cmd)
	how.addChainFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	on.addFlags(cmd, "b", "image to stand on")
	cmd.Flags().BoolVar(&flatten, "flatten", false, "let it stand on nothing")
	cmd.Flags().BoolVarP(&unsafe, "unsafe", "u", false, "change the link alone, whatever the parents hold")
	addProgressFlag(cmd)
	return cmd
}

func rebase(cmd *cobra.Command, how access, on parentFlags, path string, unsafe bool) error {
	at, err := locate(path, how.root)
	if err != nil {
		return err
	}
	defer at.close()
	r := formats.Rebasing{Open: how.options(vfs.ReadWrite), ParentFormat: on.format, Unsafe: unsafe}
	if on.path != "" {
		if r.Parent, err = on.name(at); err != nil {
			return err
		}
	}
	progress, end := startProgress(cmd, "rebasing", inBytes)
	err = formats.Rebase(cmd.Context(), at.fs, at.name, r, progress)
	end()
	if err != nil {
		return how.explain(at.explain(err))
	}
	return nil
}
