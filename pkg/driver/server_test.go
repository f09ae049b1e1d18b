package driver

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func controllerOnly(t *testing.T) *Driver {
	t.Helper()
	d, err := New(Config{Version: "test", Controller: &ControllerConfig{Stores: map[string]Store{"main": newFakeStore()}, Formats: testFormats}})
	must(t, "New", err)
	return d
}

func TestRun_Endpoints(t *testing.T) {
	for _, endpoint := range []string{"", "/run/csi.sock", "tcp://127.0.0.1:1", "unix://relative.sock", "unix:relative.sock", "unix://"} {
		if err := controllerOnly(t).Run(t.Context(), endpoint); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%q: %v, want ErrInvalid", endpoint, err)
		}
	}
}

func TestRun_WhatIsAtTheSocket(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	must(t, "write", os.WriteFile(file, []byte("precious"), 0o600))
	if err := controllerOnly(t).Run(t.Context(), "unix://"+file); !errors.Is(err, block.ErrExists) {
		t.Errorf("a file: %v, want ErrExists", err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file: %q, %v", text, err)
	}

	socket := filepath.Join(dir, "socket")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	must(t, "listen", err)
	listener.SetUnlinkOnClose(false)
	if err := controllerOnly(t).Run(t.Context(), "unix://"+socket); !errors.Is(err, block.ErrBusy) {
		t.Errorf("a socket in use: %v, want ErrBusy", err)
	}
	listener.Close()
	conn := runDriver(t, controllerOnly(t), socket)
	info, err := os.Stat(socket)
	must(t, "a stale socket is replaced", err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
	_, err = csi.NewNodeClient(conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	wantCode(t, "a service that is not configured", err, codes.Unimplemented)
	caps, err := csi.NewIdentityClient(conn).GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	must(t, "GetPluginCapabilities", err)
	if len(caps.GetCapabilities()) != 2 {
		t.Errorf("got %v", caps)
	}
}

// TestRun_StopsGracefully ends the driver while a call is in progress.
func TestRun_StopsGracefully(t *testing.T) {
	b := &bench{t: t, store: newFakeStore(), mounter: newFakeMounter(), dir: t.TempDir()}
	d, err := New(Config{Version: "test", Controller: &ControllerConfig{Stores: map[string]Store{"main": b.store}, Formats: testFormats}})
	must(t, "New", err)
	socket := filepath.Join(b.dir, "csi.sock")
	listener, err := listen(t.Context(), socket)
	must(t, "listen", err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Serve(ctx, listener) }()
	b.connect(dial(t, socket))
	release := b.store.hold("CreateVolume")
	defer release()
	called := make(chan error, 1)
	go func() {
		_, err := b.controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*csi.VolumeCapability{blockWriter}})
		called <- err
	}()
	waitUntil(t, "the call is in progress", func() bool { return b.store.count("CreateVolume") == 1 })
	cancel()
	select {
	case <-ended:
		t.Error("the driver ended with a call in progress")
	case err := <-called:
		t.Errorf("the call ended: %v", err)
	default:
	}
	release()
	must(t, "the call", <-called)
	must(t, "Serve", <-ended)
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestNew_Invalid(t *testing.T) {
	store := map[string]Store{"main": newFakeStore()}
	attacher, mounter := newFakeAttacher(nil, nil), newFakeMounter()
	good := &NodeConfig{ID: "n", Attacher: attacher, Mounter: mounter}
	for name, cfg := range map[string]Config{
		"no version":       {Node: good},
		"no service":       {Version: "1"},
		"no stores":        {Version: "1", Controller: &ControllerConfig{Formats: testFormats}},
		"no formats":       {Version: "1", Controller: &ControllerConfig{Stores: store}},
		"nil store":        {Version: "1", Controller: &ControllerConfig{Stores: map[string]Store{"main": nil}, Formats: testFormats}},
		"store's name":     {Version: "1", Controller: &ControllerConfig{Stores: map[string]Store{"Main/x": store["main"]}, Formats: testFormats}},
		"no node id":       {Version: "1", Node: &NodeConfig{Attacher: attacher, Mounter: mounter}},
		"long node id":     {Version: "1", Node: &NodeConfig{ID: strings.Repeat("n", 129), Attacher: attacher, Mounter: mounter}},
		"negative volumes": {Version: "1", Node: &NodeConfig{ID: "n", MaxVolumes: -1, Attacher: attacher, Mounter: mounter}},
		"no attacher":      {Version: "1", Node: &NodeConfig{ID: "n", Mounter: mounter}},
		"no mounter":       {Version: "1", Node: &NodeConfig{ID: "n", Attacher: attacher}},
	} {
		if _, err := New(cfg); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := New(Config{Version: "1", Node: good}); err != nil {
		t.Errorf("a good one: %v", err)
	}
}
