package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/hostmount"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/wire"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
)

const (
	// supervisorInterval is how often the driver looks whether its supervisor runs.
	supervisorInterval = 2 * time.Second
	// collectInterval is how often stores are rid of what nothing needs.
	collectInterval = 10 * time.Minute
	// stopPatience is how long ending may take after the driver has stopped.
	stopPatience = 10 * time.Second
)

type standaloneOptions struct {
	endpoint string
	stores   []string
	run      runDir
	nodeID   string
	metrics  string // address
}

func newStandaloneCommand() *cobra.Command {
	var opts standaloneOptions
	cmd := &cobra.Command{
		Use:   "standalone --endpoint unix:///PATH --store NAME=PATH",
		Short: "Run the CSI driver, all services, for this one machine",
		Long: `Runs the CSI driver for any CSI client on this machine: Identity, Controller and Node.

Volumes are kept attached by a supervisor, which is a process of its own: the driver may be
stopped, killed and updated while volumes are in use. On SIGTERM the driver stops; the
supervisor does, too, if nothing is attached.`,
		Example: "  csi-imgdisk store init /srv/volumes\n  csi-imgdisk standalone --endpoint unix:///run/csi.sock --store main=/srv/volumes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return standalone(cmd, opts)
		},
	}
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.endpoint, "endpoint", "", "where to listen: unix:///absolute/path.sock")
	flags.StringArrayVar(&opts.stores, "store", nil, "NAME=PATH of a store; may be given several times")
	flags.StringVar(&opts.nodeID, "node-id", host, "what this machine is called")
	addRunDirFlag(cmd, &opts.run)
	addMetricsFlag(cmd, &opts.metrics)
	for _, name := range []string{"endpoint", "store"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err)
		}
	}
	return cmd
}

func standalone(cmd *cobra.Command, opts standaloneOptions) error {
	ctx := cmd.Context()
	stores, err := openStores(ctx, opts.stores)
	if err != nil {
		return unlessTold(ctx, err)
	}
	defer stores.close()
	client, err := ensureSupervisor(ctx, opts.run)
	if err != nil {
		return unlessTold(ctx, err)
	}
	d, err := driver.New(driver.Config{
		Version:    version,
		Controller: &driver.ControllerConfig{Stores: stores.forDriver(), Formats: wire.Formats(), Nodes: []string{opts.nodeID}},
		Node: &driver.NodeConfig{
			ID: opts.nodeID, MaxVolumes: driver.DefaultMaxVolumes,
			Attacher: wire.Attacher(client, serverArgs(stores.roots, opts.run)),
			Mounter:  hostmount.New(),
		},
	})
	if err != nil {
		return err
	}
	serveMetrics(ctx, client, opts.metrics, slog.Default())
	err = runWithSupervisor(ctx, d, stores, opts)
	if errors.Is(err, block.ErrBusy) {
		return err // the endpoint is another driver's, and the supervisor perhaps, too
	}
	return errors.Join(unlessTold(ctx, err), stopSupervisor(cmd, client, opts.run))
}

// unlessTold returns err, but nil if it says that ctx was ended: by a signal, which may
// come at any time and is obeyed.
func unlessTold(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// runWithSupervisor runs the driver, and keeps its supervisor running meanwhile.
func runWithSupervisor(ctx context.Context, d *driver.Driver, stores *stores, opts standaloneOptions) error {
	var keeping sync.WaitGroup
	defer keeping.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	keeping.Go(func() { keepSupervisor(ctx, opts.run) })
	go stores.collect(ctx) // not waited for: a store may hang
	return d.Run(ctx, opts.endpoint)
}

// serverArgs adds where this machine's state is kept to what the driver's wiring makes.
func serverArgs(roots map[string]string, run runDir) func(driver.AttachSpec) ([]string, error) {
	args := wire.ServerArgs(roots)
	return func(spec driver.AttachSpec) ([]string, error) {
		list, err := args(spec)
		return append(list, "--run-dir", string(run)), err
	}
}

// keepSupervisor starts the supervisor again when it has ended, until ctx ends.
func keepSupervisor(ctx context.Context, run runDir) {
	ticker := time.NewTicker(supervisorInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if _, err := ensureSupervisor(ctx, run); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "the supervisor does not answer")
			}
		}
	}
}

// stopSupervisor ends the supervisor if nothing is attached, else says what stays. Nobody
// may start one meanwhile.
func stopSupervisor(cmd *cobra.Command, client *supervisor.Client, run runDir) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), stopPatience)
	defer cancel()
	if err := supervisor.Stop(ctx, run.supervisor()); !errors.Is(err, block.ErrBusy) {
		return err
	}
	list, err := client.List(ctx)
	if err != nil {
		return err
	}
	var ids []string
	for _, att := range list {
		ids = append(ids, att.ID)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "the supervisor goes on, because these stay attached: %s\n", strings.Join(ids, ", "))
	return nil
}

// stores are the driver's stores, by name.
type stores struct {
	roots  map[string]string // absolute paths
	opened map[string]*openedStore
}

func openStores(ctx context.Context, flags []string) (*stores, error) {
	s := &stores{roots: map[string]string{}, opened: map[string]*openedStore{}}
	for _, flag := range flags {
		if err := s.add(ctx, flag); err != nil {
			s.close()
			return nil, fmt.Errorf("--store %s: %w", flag, err)
		}
	}
	return s, nil
}

func (s *stores) add(ctx context.Context, flag string) error {
	named, err := parseStore(flag)
	if err != nil {
		return err
	}
	if s.opened[named.name] != nil {
		return fmt.Errorf("%w: another store has this name", block.ErrInvalid)
	}
	opened, err := named.open(ctx, store.Options{FinishCreations: true})
	if err != nil {
		return err
	}
	s.roots[named.name], s.opened[named.name] = named.path, opened
	return nil
}

func (s *stores) forDriver() map[string]driver.Store {
	list := map[string]driver.Store{}
	for name, opened := range s.opened {
		list[name] = wire.Store(opened.Store)
	}
	return list
}

// collect rids the stores of what nothing needs, from time to time, until ctx ends.
func (s *stores) collect(ctx context.Context) {
	ticker := time.NewTicker(collectInterval)
	defer ticker.Stop()
	for {
		for name, opened := range s.opened {
			if _, err := opened.GC(ctx); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "collect garbage", "store", name)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (s *stores) close() {
	for _, opened := range s.opened {
		_ = opened.Close() // volumes are other processes'
	}
}
