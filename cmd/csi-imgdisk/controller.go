package main

import (
	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/wire"
)

type controllerOptions struct {
	endpoint string
	stores   storeFlags
	http     string // address
	logs     logFlags
}

func newControllerCommand() *cobra.Command {
	var opts controllerOptions
	cmd := &cobra.Command{
		Use:   "controller --endpoint unix:///PATH --store-config FILE",
		Short: "Run the CSI driver's controller, for a cluster",
		Long: `Runs the CSI services Identity and Controller: volumes and snapshots are made, deleted,
published and grown by changing records in the stores. Nothing runs on nodes for that.

It starts whether or not the stores are there. One that is not is tried again, and calls
that need it say why. Several controllers can run at once.`,
		Example: "  csi-imgdisk controller --endpoint unix:///csi/csi.sock --store-config /etc/csi-imgdisk/stores.json",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return controller(cmd, opts) },
	}
	addEndpointFlag(cmd, &opts.endpoint)
	opts.stores.add(cmd)
	addHTTPFlag(cmd, &opts.http, "/readyz (all stores are there) and /metrics")
	opts.logs.add(cmd)
	return cmd
}

func controller(cmd *cobra.Command, opts controllerOptions) error {
	if err := opts.logs.apply(); err != nil {
		return err
	}
	ctx := cmd.Context()
	stores, err := openLater(ctx, &opts.stores)
	if err != nil {
		return err
	}
	defer stores.close()
	d, err := driver.New(driver.Config{
		Version:    version,
		Controller: &driver.ControllerConfig{Stores: stores.forDriver(), Formats: wire.Formats()},
	})
	if err != nil {
		return err
	}
	serveHealth(ctx, opts.http, stores.problems, stores.gauges.handler())
	return unlessTold(ctx, d.Run(ctx, opts.endpoint))
}
