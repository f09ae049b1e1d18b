package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

func newSupervisorCommand() *cobra.Command {
	var run runDir
	var metricsAddress string
	var stores storeFlags
	var guarded bool
	cmd := &cobra.Command{
		Use:   "supervisor",
		Short: "Keep volumes attached: start, watch and restart their servers",
		Long: `Starts, watches and restarts the processes that serve this machine's volumes, as the node
plugin or another client asks at a socket in --run-dir. What is attached lives on when it
ends, and is taken over by the next one.

Stores that are NFS exports or SMB shares are mounted here, because the servers see them.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if guarded {
				return guard(cmd.Context(), slog.Default())
			}
			if err := run.prepare(); err != nil {
				return err
			}
			if stores.given() {
				if err := stores.keepMounted(cmd.Context(), run.storeStatus()); err != nil {
					return err
				}
			}
			slog.SetDefault(logger())
			s, err := supervisor.New(supervisor.Config{
				StateDir:   run.supervisor(),
				KeeperArgs: []string{"keeper"},
				Transports: []attach.Transport{attach.NewNBD(attach.NBDOptions{}), attach.NewUBLK(), attach.NewFUSE()},
				Version:    version,
				Log:        slog.Default(),
			})
			if err != nil {
				return err
			}
			observe(cmd.Context(), s, metricsAddress)
			return s.Run(cmd.Context())
		},
	}
	addRunDirFlag(cmd, &run)
	addMetricsFlag(cmd, &metricsAddress)
	stores.add(cmd)
	cmd.Flags().BoolVar(&guarded, "guard", false, "run it as a child and start it again whenever it ends: for the first process of a container")
	return cmd
}

// startPatience is how long the supervisor may take to answer once it has been started.
const startPatience = 30 * time.Second

// ensureSupervisor returns a client of this machine's supervisor, which is started if it
// does not run. A start that has begun is finished also when ctx ends: a supervisor that
// is told to stop should be one that has come to be.
func ensureSupervisor(ctx context.Context, run runDir) (*supervisor.Client, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("block devices can be made by root only")
	}
	if err := run.prepare(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start the supervisor: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startPatience)
	defer cancel()
	return supervisor.Ensure(ctx, supervisorOf(run))
}

// supervisorOf says how a supervisor is started.
func supervisorOf(run runDir) supervisor.EnsureConfig {
	return supervisor.EnsureConfig{
		StateDir: run.supervisor(),
		Args:     []string{"supervisor", "--run-dir", string(run)},
	}
}

// runningSupervisor returns a client of the supervisor if one runs.
func runningSupervisor(run runDir) *supervisor.Client {
	return supervisor.NewClient(supervisor.SocketPath(run.supervisor()))
}
