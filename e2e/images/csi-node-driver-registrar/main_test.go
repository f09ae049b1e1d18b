package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

type driver struct {
	csi.UnimplementedIdentityServer
}

func (driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: "driver.example.org"}, nil
}

// start runs a registrar beside a driver, with a socket left by an earlier one, and returns the
// kubelet's connection and how the registrar ends.
func start(ctx context.Context, t *testing.T) (registration.RegistrationClient, <-chan error, string) {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "csi.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	csi.RegisterIdentityServer(server, driver{})
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	path := filepath.Join(dir, "driver.example.org-reg.sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- (&registrar{endpoint: "/plugins/csi.sock"}).run(ctx, socket, dir) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return registration.NewRegistrationClient(conn), ended, path
}

func TestRegister(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	kubelet, ended, path := start(ctx, t)
	info, err := kubelet.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if info.Type != "CSIPlugin" || info.Name != "driver.example.org" || info.Endpoint != "/plugins/csi.sock" || len(info.SupportedVersions) != 1 {
		t.Errorf("the kubelet is told %v", info)
	}
	if _, err := kubelet.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("told to end: %v", err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left")
	}
}

func TestRefused(t *testing.T) {
	kubelet, ended, _ := start(t.Context(), t)
	status := &registration.RegistrationStatus{Error: "two drivers of one name"}
	// The registrar may be gone before it has answered.
	_, _ = kubelet.NotifyRegistrationStatus(t.Context(), status, grpc.WaitForReady(true))
	if err := <-ended; err == nil || !strings.Contains(err.Error(), status.Error) {
		t.Errorf("refused by the kubelet: %v", err)
	}
}

func TestNoPath(t *testing.T) {
	err := new(registrar).run(t.Context(), "/nowhere", t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "--kubelet-registration-path") {
		t.Errorf("without a path: %v", err)
	}
}
