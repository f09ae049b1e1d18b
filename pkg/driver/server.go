package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	// stopPatience is how long calls may take to end after Run's context has ended.
	stopPatience = 10 * time.Second
	// maxMessageBytes bounds a request.
	maxMessageBytes = 1 << 20
)

// Run serves CSI on an endpoint, "unix:///run/csi.sock", until ctx ends; then it waits
// some seconds for calls in progress. A socket that a killed process left is replaced;
// one that a process listens on is block.ErrBusy. A Driver runs once.
func (d *Driver) Run(ctx context.Context, endpoint string) error {
	path, err := socketPath(endpoint)
	if err != nil {
		return err
	}
	listener, err := listen(ctx, path)
	if err != nil {
		return err
	}
	return d.Serve(ctx, listener)
}

// Serve is Run on a listener of the caller's, which it closes.
func (d *Driver) Serve(ctx context.Context, listener net.Listener) error {
	stopped := make(chan struct{})
	served := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-ctx.Done():
		case <-served:
		}
		d.stop()
	}()
	klog.FromContext(ctx).Info("serving CSI", "driver", Name, "services", d.services, "address", listener.Addr().String())
	err := d.server.Serve(listener)
	close(served)
	<-stopped
	if err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve CSI on %s: %w", listener.Addr(), err)
	}
	return nil
}

// stop ends the server: gracefully if calls end soon.
func (d *Driver) stop() {
	timer := time.AfterFunc(stopPatience, d.server.Stop)
	defer timer.Stop()
	d.server.GracefulStop()
}

// socketPath returns the path in an endpoint such as "unix:///run/csi.sock".
func socketPath(endpoint string) (string, error) {
	path, ok := strings.CutPrefix(endpoint, "unix:")
	path = strings.TrimPrefix(path, "//")
	if !ok || !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("endpoint %q: %w: want unix:///absolute/path.sock", endpoint, block.ErrInvalid)
	}
	return path, nil
}

// listen makes a socket that only its owner can use, in the place of one that nobody
// listens on any more.
func listen(ctx context.Context, path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen on %s: there is a file that is no socket: %w", path, block.ErrExists)
	default:
		if err := removeStale(ctx, path); err != nil {
			return nil, err
		}
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), listener.Close())
	}
	return listener, nil
}

func removeStale(ctx context.Context, path string) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("listen on %s: another process does: %w", path, block.ErrBusy)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listen on %s: is it in use: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listen on %s: remove what a dead process left: %w", path, err)
	}
	return nil
}

func newGRPCServer() *grpc.Server {
	return grpc.NewServer(grpc.MaxRecvMsgSize(maxMessageBytes), grpc.UnaryInterceptor(intercept))
}

// intercept logs a call, turns a panic into an error and errors into statuses. It logs
// no field of a request but the ids: the others may be secrets.
func intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	log := klog.FromContext(ctx).WithValues(append([]any{"method", method}, subject(req)...)...)
	ctx = klog.NewContext(ctx, log)
	began := time.Now()
	resp, err := recovered(ctx, req, handler)
	took := time.Since(began).Round(time.Millisecond)
	switch {
	case err == nil:
		log.V(verbosity(method)).Info("call", "took", took)
		return resp, nil
	case expected(err):
		log.Info("call refused", "took", took, "code", codeOf(err), "reason", err.Error())
	default:
		log.Error(err, "call failed", "took", took, "code", codeOf(err))
	}
	return nil, toStatus(err)
}

// verbosity keeps polling out of ordinary logs.
func verbosity(method string) int {
	for _, prefix := range []string{"Probe", "GetPlugin", "List", "Get", "NodeGet", "ControllerGet"} {
		if strings.HasPrefix(method, prefix) {
			return 4
		}
	}
	return 2
}

// recovered calls a handler; a defect in one call must not end the others.
func recovered(ctx context.Context, req any, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			klog.FromContext(ctx).Error(nil, "panic", "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	return handler(ctx, req)
}

// subject returns the ids in a request as keys and values for a log.
func subject(req any) []any {
	var keys []any
	add := func(key, value string) {
		if value != "" {
			keys = append(keys, key, value)
		}
	}
	if r, ok := req.(interface{ GetName() string }); ok {
		add("name", r.GetName())
	}
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		add("volume", r.GetVolumeId())
	}
	if r, ok := req.(interface{ GetSourceVolumeId() string }); ok {
		add("source", r.GetSourceVolumeId())
	}
	if r, ok := req.(interface{ GetSnapshotId() string }); ok {
		add("snapshot", r.GetSnapshotId())
	}
	if r, ok := req.(interface{ GetNodeId() string }); ok {
		add("node", r.GetNodeId())
	}
	if r, ok := req.(interface{ GetTargetPath() string }); ok {
		add("target", r.GetTargetPath())
	}
	return keys
}
