package main

import (
	"github.com/spf13/cobra"
)

func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Look into, make, convert, compare and change disk images",
	}
	cmd.AddCommand(
		newInfoCommand(), newCheckCommand(), newMapCommand(), newCreateCommand(),
		newConvertCommand(), newCompareCommand(), newResizeCommand(), newMeasureCommand(),
		newRebaseCommand(), newCommitCommand(), newSnapshotCommand(),
	)
	return cmd
}
