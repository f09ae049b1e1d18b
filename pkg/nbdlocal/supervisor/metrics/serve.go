package metrics

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Path is where metrics are served.
const Path = "/metrics"

const (
	// maxScrapes is how many scrapes are answered at a time.
	maxScrapes = 4
	// listenInterval is how often an address that is taken is tried again.
	listenInterval = 5 * time.Second
)

// Handler serves the metrics of a source's attachments, and those of this process.
func Handler(source Source, version string, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		NewCollector(source, version),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ErrorHandling:       promhttp.ContinueOnError, // what there is is worth having
		MaxRequestsInFlight: maxScrapes,
	})
}

// DebugHandler serves the profiles of this process below /debug/pprof/.
func DebugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// ListenAndServe serves the metrics over TCP on an address, host:port, until ctx ends. An
// address that cannot be had is no reason to end, since volumes depend on who calls this:
// it is tried again, and the log tells.
func ListenAndServe(ctx context.Context, address string, handler http.Handler, log *slog.Logger) {
	for told := false; ctx.Err() == nil; {
		var listen net.ListenConfig
		l, err := listen.Listen(ctx, "tcp", address)
		if err == nil {
			log.Info("metrics are served", "address", l.Addr().String(), "path", Path)
			err = serve(ctx, l, handler)
			told = false
		}
		if err != nil && ctx.Err() == nil && !told {
			log.Error("metrics cannot be served; will be tried again", "address", address, "error", err)
			told = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(listenInterval):
		}
	}
}

// serve serves the metrics, and nothing else, on a listener.
func serve(ctx context.Context, l net.Listener, handler http.Handler) error {
	mux := http.NewServeMux()
	mux.Handle("GET "+Path, handler)
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		WriteTimeout:      time.Minute,
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
