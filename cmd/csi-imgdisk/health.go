package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

// listenInterval is how often an address that is taken is tried again.
const listenInterval = 5 * time.Second

func addEndpointFlag(cmd *cobra.Command, endpoint *string) {
	cmd.Flags().StringVar(endpoint, "endpoint", "", "where to listen: unix:///absolute/path.sock")
	if err := cmd.MarkFlagRequired("endpoint"); err != nil {
		panic(err)
	}
}

func addHTTPFlag(cmd *cobra.Command, address *string, what string) {
	cmd.Flags().StringVar(address, "http-address", "", "HOST:PORT on which to serve /healthz (the process runs), "+what)
}

// logFlags say how much is logged.
type logFlags struct{ verbosity int }

func (f *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().IntVarP(&f.verbosity, "verbosity", "v", 2, "how much to log: 0 what fails, 2 calls that change something, 4 all calls")
}

func (f *logFlags) apply() error {
	set := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(set)
	return set.Set("v", strconv.Itoa(f.verbosity))
}

// serveHealth serves over HTTP, until ctx ends, whether this process runs and is ready, and
// its metrics if it has any. An address that cannot be had is tried again.
func serveHealth(ctx context.Context, address string, ready func() error, metrics http.Handler) {
	if address == "" {
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
	}
	go func() {
		for ctx.Err() == nil {
			if err := serveHTTP(ctx, address, mux); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "health is not served; it is tried again", "address", address)
			}
			select {
			case <-ctx.Done():
			case <-time.After(listenInterval):
			}
		}
	}()
}

func serveHTTP(ctx context.Context, address string, handler http.Handler) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute,
		IdleTimeout: 5 * time.Minute, MaxHeaderBytes: 16 << 10,
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// storeGauges are what the controller's metrics say about stores.
type storeGauges struct {
	registry         *prometheus.Registry
	open, free, info *prometheus.GaugeVec
}

func newStoreGauges() *storeGauges {
	g := &storeGauges{
		registry: prometheus.NewRegistry(),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "csi_imgdisk_store_open", Help: "1 if the controller has the store open, 0 if it cannot be mounted or opened.",
		}, []string{"store"}),
		free: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "csi_imgdisk_store_available_bytes", Help: "Space that is free in the store, as of a minute ago at most.",
		}, []string{"store"}),
		info: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "csi_imgdisk_controller_build_info", Help: "Always 1; the labels say which build of the controller this is.",
		}, []string{"version", "goversion"}),
	}
	g.info.WithLabelValues(version, goVersion()).Set(1)
	g.registry.MustRegister(g.open, g.free, g.info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return g
}

func (g *storeGauges) ready(store string, is bool) {
	value := 0.0
	if is {
		value = 1
	}
	g.open.WithLabelValues(store).Set(value)
}

func (g *storeGauges) available(store string, bytes int64) {
	g.free.WithLabelValues(store).Set(float64(bytes))
}

func (g *storeGauges) handler() http.Handler {
	return promhttp.HandlerFor(g.registry, promhttp.HandlerOpts{})
}
