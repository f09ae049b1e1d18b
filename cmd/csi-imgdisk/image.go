package main

import (
	"github.com/spf13/cobra"
)

func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Look into, make, convert and compare disk images",
	}
	cmd.AddCommand(
		newInfoCommand(), newCheckCommand(), newMapCommand(), newCreateCommand(),
		newConvertCommand(), newCompareCommand(), newResizeCommand(),
	)
	return cmd
}
