package main

import (
	"context"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor/metrics"
)

// logger writes keys and values to standard error, as processes in the background do.
func logger() *slog.Logger { return slog.New(slog.NewTextHandler(os.Stderr, nil)) }

func addMetricsFlag(cmd *cobra.Command, address *string) {
	cmd.Flags().StringVar(address, "metrics-address", "", "HOST:PORT on which to serve Prometheus metrics; the supervisor's socket has them anyway")
}

// observe has a supervisor's socket serve metrics and profiles, and metrics be served
// over TCP as well if there is an address.
func observe(ctx context.Context, s *supervisor.Supervisor, address string) {
	s.Handle("GET "+metrics.Path, metrics.Handler(s, version, slog.Default()))
	s.Handle("/debug/", metrics.DebugHandler())
	serveMetrics(ctx, s, address, slog.Default())
}

// serveMetrics serves a source's metrics over TCP until ctx ends, if there is an address.
func serveMetrics(ctx context.Context, source metrics.Source, address string, log *slog.Logger) {
	if address != "" {
		go metrics.ListenAndServe(ctx, address, metrics.Handler(source, version, log), log)
	}
}
