package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// driver answers Probe as it is told.
type driver struct {
	csi.UnimplementedIdentityServer
	ready *wrapperspb.BoolValue
	err   error
}

func (d driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: d.ready}, d.err
}

// status is what /healthz answers for a driver.
func status(t *testing.T, d *driver) int {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "csi.sock")
	if d != nil {
		listener, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer()
		csi.RegisterIdentityServer(server, d)
		go func() { _ = server.Serve(listener) }()
		defer server.Stop()
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answer := httptest.NewRecorder()
	healthz{csi.NewIdentityClient(conn), time.Minute}.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/healthz", nil))
	return answer.Code
}

func TestHealthz(t *testing.T) {
	for name, test := range map[string]struct {
		driver *driver
		want   int
	}{
		"ready":       {&driver{ready: wrapperspb.Bool(true)}, http.StatusOK},
		"says naught": {&driver{}, http.StatusOK},
		"not ready":   {&driver{ready: wrapperspb.Bool(false)}, http.StatusInternalServerError},
		"fails":       {&driver{err: errors.New("no")}, http.StatusInternalServerError},
		"not there":   {nil, http.StatusInternalServerError},
	} {
		if got := status(t, test.driver); got != test.want {
			t.Errorf("a driver that is %s: %d, want %d", name, got, test.want)
		}
	}
}
