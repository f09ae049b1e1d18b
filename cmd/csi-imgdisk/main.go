// Command csi-imgdisk is everything in one binary: the CSI driver, the processes that
// serve volumes, and tools for disk images and stores. It only wires packages together.
//
//   - main.go, output.go: the root command, errors and exit codes, text and JSON
//   - location.go, access.go: from a path on the command line to an open image
//   - info.go … resize.go: `image`
//   - serve.go, listen.go: an NBD server for foreign clients
//   - attach.go, supervisor.go, server.go: local block devices
//   - store.go, standalone.go: stores, and the driver on one machine
//   - controller.go, node.go, storeset.go, guard.go, health.go: the driver in a cluster
//   - internal/demo: the main job, end to end
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
)

// version is set by the linker: see the Makefile.
var version = "unknown"

func main() {
	all.Register()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRootCommand().ExecuteContext(ctx)
	cancel()
	os.Exit(report(err))
}

// report tells why a command failed and returns its exit code.
func report(err error) int {
	if err == nil {
		return 0
	}
	code := 1
	if failed := (*exitError)(nil); errors.As(err, &failed) {
		code = failed.code
		err = failed.err
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", sentence(err))
	}
	return code
}

// exitError ends the program with a code other than 1.
type exitError struct {
	code int
	err  error // nil: the output has said it already
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// sentence puts an error into one line.
func sentence(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "csi-imgdisk",
		Short: "Disk images on shared storage as Kubernetes volumes",
		Long: `csi-imgdisk serves disk images (VMDK, raw) that lie on shared storage as Kubernetes
volumes, and as block devices on this machine.

Sizes are bytes, or have a unit: 512M, 10G, 10Gi; units are powers of 1024, with or
without the i. The exit code is 0 for success and 1 for an error; ` + "`image check`" + ` and
` + "`image compare`" + ` have more, those of qemu-img.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	addOutputFlag(root)
	root.AddCommand(
		newImageCommand(),
		newServeCommand(),
		newAttachCommand(), newDetachCommand(), newDevicesCommand(),
		newStoreCommand(),
		newStandaloneCommand(),
		newControllerCommand(), newNodeCommand(), newSupervisorCommand(),
		newDemoCommand(),
		newUpgradeCommand(),
		newServerCommand(), newKeeperCommand(),
		newVersionCommand(),
	)
	return root
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			info := map[string]string{"version": version, "go": goVersion()}
			return emit(cmd, info, func(p *printer) {
				p.line("csi-imgdisk %s, built with %s", version, goVersion())
			})
		},
	}
}

func goVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.GoVersion
	}
	return "an unknown Go"
}
