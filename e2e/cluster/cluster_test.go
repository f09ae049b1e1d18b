package cluster

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

func TestFreeAddresses(t *testing.T) {
	for range 100 {
		first, second, err := freeAddresses()
		if err != nil {
			t.Fatal(err)
		}
		a, b := netip.MustParseAddr(first), netip.MustParseAddr(second)
		if !hostPool.Contains(a) || a.Next() != b || a.As4()[3]%addressesPerCluster != 1 {
			t.Errorf("%s and %s are not the two of a pair in %v", first, second, hostPool)
		}
	}
}

func TestOverlaps(t *testing.T) {
	used := []net.Addr{
		&net.IPNet{IP: net.IPv4(198, 18, 4, 1), Mask: net.CIDRMask(30, 32)},
		&net.IPNet{IP: net.ParseIP("fe80::1"), Mask: net.CIDRMask(64, 128)},
	}
	for prefix, want := range map[string]bool{"198.18.4.0/30": true, "198.18.4.4/30": false, "198.18.0.0/30": false} {
		if got := overlaps(netip.MustParsePrefix(prefix), used); got != want {
			t.Errorf("overlaps(%s) = %v", prefix, got)
		}
	}
}

// TestCertificates: a server and a client of one authority accept each other, by address.
func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	ca, err := newAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.server("server", []string{"127.0.0.1"}, []string{"localhost"}); err != nil {
		t.Fatal(err)
	}
	text, err := ca.kubeconfig("client", "system:node:a", "system:nodes", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(text)
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.TLSConfigFor(config)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
	if err != nil {
		t.Fatal(err)
	}
	server := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: client.RootCAs}
	client.ServerName = "127.0.0.1"
	ours, theirs := net.Pipe()
	failed := make(chan error, 1)
	accepted := tls.Server(theirs, server)
	go func() { failed <- accepted.Handshake() }()
	if err := tls.Client(ours, client).Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	subject := accepted.ConnectionState().PeerCertificates[0].Subject
	if subject.CommonName != "system:node:a" || !slices.Equal(subject.Organization, []string{"system:nodes"}) {
		t.Errorf("the server sees %v", subject)
	}
}

func TestSettings(t *testing.T) {
	c := newCluster(t.TempDir())
	got := c.Machine(NodeA).settings()
	for _, want := range []string{"NAME=node-a\n", "ADDRESS=10.77.0.11/24\n", "POD_CIDR=10.78.1.0/24\n", "ROUTES='10.78.2.0/24=10.77.0.12'\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if got := c.Machine(NFS).settings(); !strings.Contains(got, "POD_CIDR=\n") {
		t.Errorf("the NFS server is a node:\n%s", got)
	}
}

// TestTelling: of long logs, the last lines that tell something, without the runtime's prefix.
func TestTelling(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "node-a/pods/csi-imgdisk_node-x_1/driver/0.log")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	for range 20 {
		log.WriteString("2026-11-21T21:00:00Z stderr F level=INFO msg=nothing\n2026-11-21T21:00:00Z stderr F level=ERROR msg=early\n")
	}
	log.WriteString("2026-11-21T21:00:01Z stderr F level=ERROR msg=" + strings.Repeat("x", 1000) + "\n")
	if err := os.WriteFile(file, log.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	lines := Telling(dir)
	if len(lines) != tellingPerFile {
		t.Fatalf("%d lines: %q", len(lines), lines)
	}
	if want := "node-a/pods/csi-imgdisk_node-x_1/driver/0.log: level=ERROR msg=early"; lines[0] != want {
		t.Errorf("%q, want %q", lines[0], want)
	}
	if last := lines[len(lines)-1]; !strings.Contains(last, "msg=xxx") || len(last) > tellingLineBytes+100 {
		t.Errorf("%d bytes: %q", len(last), last)
	}
}

func TestOpen_None(t *testing.T) {
	if _, err := Open(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want one that says that it does not exist", err)
	}
}
