package main

import (
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/csi-imgdisk/csi-imgdisk/cmd/csi-imgdisk/internal/demo"
)

func newDemoCommand() *cobra.Command {
	var image string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job end to end on this machine, as root",
		Long: `Shows the main job end to end, through the CSI calls that Kubernetes makes: a VMware disk
becomes a volume without being copied, is attached as a block device, mounted and read; an
empty volume is formatted, written, snapshotted while it is written, restored, cloned and
expanded. Nothing is left behind, also after an interrupt.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDemo(cmd, image)
		},
	}
	cmd.Flags().StringVar(&image, "image", "", "disk image to import instead of the sample: a VMDK of your own; it is only read")
	return cmd
}

func runDemo(cmd *cobra.Command, image string) error {
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	opts := demo.Options{Binary: binary, Out: cmd.OutOrStdout(), Terminal: term.IsTerminal(int(os.Stdout.Fd()))}
	if image != "" {
		if opts.Image, err = filepath.Abs(image); err != nil {
			return err
		}
	}
	if wantsJSON(cmd) {
		opts.Out, opts.Terminal = io.Discard, false
	}
	// A terminal or pipe that goes away must not keep it from cleaning up.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, cancel := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
	defer cancel()
	steps, err := demo.Run(ctx, opts)
	if err == nil && wantsJSON(cmd) {
		err = emit(cmd, steps, func(*printer) {})
	}
	return err
}
