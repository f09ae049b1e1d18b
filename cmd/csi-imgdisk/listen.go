package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal"
)

// listenOptions say where `serve` waits for clients, and how they prove who they are.
type listenOptions struct {
	socket  string
	address string

	tls          tlsMode
	certificates string
	verifyPeer   bool
	psk          string
}

// tlsMode is the value of --tls.
type tlsMode string

const (
	tlsUnset   tlsMode = ""
	tlsOff     tlsMode = "off"
	tlsOn      tlsMode = "on"
	tlsRequire tlsMode = "require"
)

// String implements pflag.Value.
func (m *tlsMode) String() string { return string(*m) }

// Type implements pflag.Value.
func (m *tlsMode) Type() string { return "off|on|require" }

// Set implements pflag.Value.
func (m *tlsMode) Set(s string) error {
	switch mode := tlsMode(s); mode {
	case tlsOff, tlsOn, tlsRequire:
		*m = mode
		return nil
	}
	return errors.New("want off, on or require")
}

func (o *listenOptions) addFlags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&o.socket, "socket", "", "unix socket to listen on")
	flags.StringVar(&o.address, "address", "", "HOST:PORT to listen on with TCP; :PORT is every address of this machine, and 10809 is NBD's port")
	flags.Var(&o.tls, "tls", "whether clients may (on) or must (require) use TLS; off, or require with --tls-certificates")
	flags.StringVar(&o.certificates, "tls-certificates", "", "directory of certificates and keys")
	flags.BoolVar(&o.verifyPeer, "tls-verify-peer", false, "serve only clients with a certificate that ca-cert.pem stands for")
	flags.StringVar(&o.psk, "tls-psk", "", "not supported: this program's TLS library has no pre-shared keys")
}

// required reports whether clients must use TLS.
func (o *listenOptions) required() bool {
	return o.tls == tlsRequire || o.tls == tlsUnset && o.certificates != ""
}

func (o *listenOptions) offersTLS() bool { return o.tls == tlsOn || o.required() }

// security checks the options for TLS and loads the certificates; nil without TLS.
func (o *listenOptions) security() (*tls.Config, error) {
	switch {
	case o.psk != "":
		return nil, fmt.Errorf("--tls-psk: %w: Go's crypto/tls has no cipher suites with pre-shared keys; want --tls-certificates DIR", block.ErrUnsupported)
	case o.offersTLS() && o.certificates == "":
		return nil, fmt.Errorf("--tls %s: want --tls-certificates DIR, too", o.tls)
	case !o.offersTLS() && o.certificates != "":
		return nil, fmt.Errorf("--tls %s with --tls-certificates: want one or the other", o.tls)
	case !o.offersTLS() && o.verifyPeer:
		return nil, errors.New("--tls-verify-peer: want --tls-certificates DIR, too")
	case o.verifyPeer && !o.required():
		return nil, fmt.Errorf("--tls-verify-peer with --tls %s: a client without TLS would not be verified; want --tls require", o.tls)
	case !o.offersTLS():
		return nil, nil
	}
	return nbdlocal.LoadTLS(o.certificates, o.verifyPeer)
}

// open listens where it was asked to. An address that was given by port 0 is the real one
// afterwards.
func (o *listenOptions) open(log *slog.Logger) (list []net.Listener, err error) {
	if o.socket == "" && o.address == "" {
		return nil, errors.New("nowhere to listen: want --socket PATH, or --address HOST:PORT")
	}
	if o.socket != "" {
		l, err := listenUnix(o.socket)
		if err != nil {
			return nil, err
		}
		list = append(list, l)
	}
	if o.address != "" {
		l, err := net.Listen("tcp", o.address)
		if err != nil {
			closeListeners(list)
			return nil, fmt.Errorf("--address %s: %w", o.address, err)
		}
		list = append(list, l)
		at := l.Addr().(*net.TCPAddr)
		if !o.required() && !at.IP.IsLoopback() {
			log.Warn("everybody who reaches this address can use the images: --tls require refuses strangers", "address", at)
		}
		o.address = at.String()
	}
	return list, nil
}

func closeListeners(list []net.Listener) {
	for _, l := range list {
		_ = l.Close() // it may have been closed
	}
}

// uris returns where clients find an export.
func (o *listenOptions) uris(export string) []string {
	scheme := "nbd"
	if o.required() {
		scheme = "nbds"
	}
	var list []string
	if o.socket != "" {
		// As people write it: a path is not to be unreadable for its slashes.
		list = append(list, scheme+"+unix:///"+url.PathEscape(export)+"?socket="+o.socket)
	}
	if o.address != "" {
		list = append(list, scheme+"://"+o.address+"/"+url.PathEscape(export))
	}
	return list
}

// listenUnix listens on a socket. One that a killed process left is replaced.
func listenUnix(path string) (net.Listener, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := removeStaleSocket(path); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

func removeStaleSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("listen on %s: %w as something other than a socket", path, block.ErrExists)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("listen on %s: %w", path, block.ErrLocked)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	return os.Remove(path)
}
