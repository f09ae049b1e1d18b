package main

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/hostmount"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/storemount"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/wire"
)

// statusPatience is how long the supervisor may take to say that it runs.
const statusPatience = 5 * time.Second

type nodeOptions struct {
	endpoint   string
	nodeID     string
	maxVolumes int64
	stores     storeFlags
	run        runDir
	http       string // address
	logs       logFlags
}

func newNodeCommand() *cobra.Command {
	var opts nodeOptions
	cmd := &cobra.Command{
		Use:   "node --endpoint unix:///PATH --store-config FILE",
		Short: "Run the CSI driver's node plugin, for one node of a cluster",
		Long: `Runs the CSI services Identity and Node: volumes are attached, mounted and grown here.

Volumes are kept attached by a supervisor (csi-imgdisk supervisor), which has to run with the
same --run-dir and the same stores, and mounts them. The node plugin never starts one: it
can be stopped, killed and updated while volumes are in use. It needs the host's mounts.`,
		Example: "  csi-imgdisk node --endpoint unix:///csi/csi.sock --node-id $NODE_NAME --store-config /etc/csi-imgdisk/stores.json",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return node(cmd, opts) },
	}
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	addEndpointFlag(cmd, &opts.endpoint)
	opts.stores.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&opts.nodeID, "node-id", host, "what this node is called")
	flags.Int64Var(&opts.maxVolumes, "max-volumes", driver.DefaultMaxVolumes, "how many volumes the node takes at once; 0: the cluster is told no limit")
	addRunDirFlag(cmd, &opts.run)
	addHTTPFlag(cmd, &opts.http, "/readyz (the supervisor answers)")
	opts.logs.add(cmd)
	return cmd
}

func node(cmd *cobra.Command, opts nodeOptions) error {
	if err := opts.logs.apply(); err != nil {
		return err
	}
	ctx := cmd.Context()
	roots, err := opts.stores.roots()
	if err != nil {
		return err
	}
	client := runningSupervisor(opts.run)
	d, err := driver.New(driver.Config{
		Version: version,
		Node: &driver.NodeConfig{
			ID: opts.nodeID, MaxVolumes: opts.maxVolumes,
			Attacher: wire.Attacher(client, onceMounted(opts.run.storeStatus(), serverArgs(roots, opts.run))),
			Mounter:  hostmount.New(),
		},
	})
	if err != nil {
		return err
	}
	serveHealth(ctx, opts.http, func() error {
		ctx, cancel := context.WithTimeout(ctx, statusPatience)
		defer cancel()
		_, err := client.Status(ctx)
		return err
	}, nil)
	return unlessTold(ctx, d.Run(ctx, opts.endpoint))
}

// storeStatus is where the supervisor's process says which stores are not mounted.
func (d runDir) storeStatus() storemount.Status {
	return storemount.Status(filepath.Join(string(d), "stores"))
}

// onceMounted refuses to attach a volume whose store is not mounted, and says why: its
// server would see an empty directory.
func onceMounted(status storemount.Status, args func(driver.AttachSpec) ([]string, error)) func(driver.AttachSpec) ([]string, error) {
	return func(spec driver.AttachSpec) ([]string, error) {
		if err := driver.ValidateStoreName(spec.Store); err != nil {
			return nil, err
		}
		if err := status.Get(spec.Store); err != nil {
			return nil, err
		}
		return args(spec)
	}
}
