// Command csi-node-driver-registrar stands for the sidecar of the same name in tests: it tells
// the kubelet of a CSI driver, by a socket in the directory that the kubelet watches
// (k8s.io/kubelet/pkg/apis/pluginregistration/v1).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func main() {
	klog.InitFlags(nil)
	var r registrar
	address := flag.String("csi-address", "/run/csi/socket", "the driver's socket here")
	flag.StringVar(&r.endpoint, "kubelet-registration-path", "", "the driver's socket as the kubelet sees it")
	dir := flag.String("plugin-registration-path", "/registration", "the directory that the kubelet watches, here")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := r.run(ctx, *address, *dir); err != nil {
		klog.ErrorS(err, "Ending")
		os.Exit(1)
	}
}

// registrar answers the kubelet.
type registrar struct {
	registration.UnimplementedRegistrationServer
	name, endpoint string
	refused        chan error // that the kubelet did not take the driver
}

// run registers the driver and returns when ctx is done or the kubelet refused it.
func (r *registrar) run(ctx context.Context, driver, dir string) error {
	if r.endpoint == "" {
		return errors.New("--kubelet-registration-path is missing")
	}
	r.refused = make(chan error, 1)
	var err error
	if r.name, err = driverName(ctx, driver); err != nil {
		return fmt.Errorf("ask the driver at %s for its name: %w", driver, err)
	}
	path := filepath.Join(dir, r.name+"-reg.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the socket of the one before: %w", err)
	}
	listener, err := net.Listen("unix", path) // closing it removes the file
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, r)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	defer server.Stop()
	klog.InfoS("Waiting for the kubelet", "driver", r.name, "socket", path)
	select {
	case <-ctx.Done():
		return nil
	case err := <-r.refused:
		return err
	case err := <-ended:
		return err
	}
}

// driverName waits for the driver, which may come up later.
func driverName(ctx context.Context, socket string) (string, error) {
	// Left to itself, gRPC waits up to two minutes before it looks again whether a driver is up.
	again := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second}, MinConnectTimeout: 10 * time.Second}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(again))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	for {
		info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return info.GetName(), nil
		}
		klog.ErrorS(err, "The driver does not tell its name yet")
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: r.name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	klog.InfoS("The kubelet has answered", "registered", status.PluginRegistered, "error", status.Error)
	if !status.PluginRegistered {
		select {
		case r.refused <- fmt.Errorf("the kubelet does not take the driver: %s", status.Error):
		default: // it has said so before
		}
	}
	return &registration.RegistrationStatusResponse{}, nil
}
