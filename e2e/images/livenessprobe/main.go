// Command livenessprobe stands for the sidecar of the same name in tests: it answers
// requests for /healthz by asking the driver whether it is ready (CSI, Identity.Probe).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"
)

func main() {
	klog.InitFlags(nil)
	address := flag.String("csi-address", "/run/csi/socket", "the driver's socket")
	port := flag.String("health-port", "9808", "TCP port of /healthz")
	timeout := flag.Duration("probe-timeout", time.Second, "how long the driver may take to answer")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *address, net.JoinHostPort("", *port), *timeout); err != nil {
		klog.ErrorS(err, "Ending")
		os.Exit(1)
	}
}

// run serves until ctx is done.
func run(ctx context.Context, driver, listen string, timeout time.Duration) error {
	// Left to itself, gRPC waits up to two minutes before it looks again whether a driver is up.
	again := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second}, MinConnectTimeout: 10 * time.Second}
	conn, err := grpc.NewClient("unix:"+driver, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(again))
	if err != nil {
		return fmt.Errorf("the driver's socket %s: %w", driver, err)
	}
	defer conn.Close()
	mux := http.NewServeMux()
	mux.Handle("/healthz", healthz{csi.NewIdentityClient(conn), timeout})
	server := &http.Server{Addr: listen, Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	klog.InfoS("Serving", "address", listen, "driver", driver)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// healthz answers 200 if the driver is ready, 500 and what it says if not.
type healthz struct {
	driver  csi.IdentityClient
	timeout time.Duration
}

func (h healthz) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), h.timeout)
	defer cancel()
	answer, err := h.driver.Probe(ctx, &csi.ProbeRequest{})
	if err == nil && answer.GetReady() != nil && !answer.GetReady().GetValue() {
		err = errors.New("the driver is not ready")
	}
	if err != nil {
		klog.ErrorS(err, "The driver does not live")
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write([]byte("ok")) // the client may be gone
}
