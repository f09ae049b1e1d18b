package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

func newUpgradeCommand() *cobra.Command {
	var run runDir
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Have this program serve the attached devices",
		Long: `Replaces the processes behind this machine's block devices by those of this program, without
detaching anything: first the supervisor, then the devices' servers, one after another.
Requests to a device wait while its server is replaced, for well under a second.

A device whose new server cannot serve it gets the old one back, and is the last that is
tried; the exit code is 1 then.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			results, err := upgradeServers(cmd.Context(), run)
			if err != nil {
				return err
			}
			if err := emit(cmd, results, func(p *printer) { printUpgrades(p, results) }); err != nil {
				return err
			}
			for _, r := range results {
				if r.Problem != "" {
					return &exitError{code: 1}
				}
			}
			return nil
		},
	}
	addRunDirFlag(cmd, &run)
	return cmd
}

// upgradeServers makes this program the one that keeps volumes attached. Without a
// supervisor there is nothing to do.
func upgradeServers(ctx context.Context, run runDir) ([]supervisor.UpgradeResult, error) {
	if _, err := runningSupervisor(run).Status(ctx); errors.Is(err, supervisor.ErrNotRunning) {
		return []supervisor.UpgradeResult{}, nil
	} else if err != nil {
		return nil, err
	}
	startCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startPatience)
	defer cancel()
	client, err := supervisor.Replace(startCtx, supervisorOf(run))
	if err != nil {
		return nil, err
	}
	return client.UpgradeAll(ctx, supervisor.UpgradeRequest{})
}

func printUpgrades(p *printer, results []supervisor.UpgradeResult) {
	for _, r := range results {
		id := strings.TrimPrefix(r.ID, imageID)
		switch {
		case r.Problem != "":
			p.line("%s: still %s: %s", id, r.From, r.Problem)
		case r.Replaced:
			p.line("%s: %s -> %s, requests waited for %s", id, r.From, r.To, fmt.Sprintf("%d ms", r.PauseMillis))
		default:
			p.line("%s: %s already", id, r.To)
		}
	}
}
