package main

import (
	"errors"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/confine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

func newKeeperCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:    "keeper",
		Short:  "Hold descriptors that keep devices alive, as a supervisor says",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return supervisor.RunKeeper(dir, func() error {
				_, err := confine.Process(confine.Rules{Write: []string{dir}})
				if errors.Is(err, confine.ErrUnsupported) {
					slog.Warn("the keeper has all of its rights", "because", err)
					err = nil
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory of its socket")
	return cmd
}
