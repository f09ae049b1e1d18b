package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// startExports runs `csi-imgdisk serve` with args and returns what it says when clients
// can connect: a line for each export.
func startExports(t *testing.T, exports int, args ...string) (*served, []string) {
	t.Helper()
	s := &served{t: t}
	s.cmd = exec.Command(binary, append([]string{"serve", "--run-dir", filepath.Join(t.TempDir(), "run")}, args...)...)
	s.cmd.Stderr = &s.stderr
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.end(syscall.SIGKILL) })
	var said []byte
	for one := make([]byte, 1); bytes.Count(said, []byte("\n")) < exports; {
		if _, err := stdout.Read(one); err != nil {
			s.end(syscall.SIGKILL)
			t.Fatalf("serve %v: %q, %v\n%s", args, said, err, &s.stderr)
		}
		said = append(said, one...)
	}
	return s, strings.Split(strings.TrimSpace(string(said)), "\n")
}

// TestServe_SeveralExports: clients choose images by name, on either socket, and a
// client's writes arrive in the image that it chose.
func TestServe_SeveralExports(t *testing.T) {
	qemuIO, nbdinfo := testenv.Oracle(t, "qemu-io"), testenv.Oracle(t, "nbdinfo")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	ok(t, "image", "create", at("a.vmdk"), "10M")
	ok(t, "image", "create", at("b.qcow2"), "20M")
	writeFile(t, at("c.raw"), bytes.Repeat([]byte("QFI\xfb"), 1<<18)) // as a guest may
	s, lines := startExports(t, 3, at("a.vmdk"), "--export", "b="+at("b.qcow2"), "--export", "c="+at("c.raw"),
		"--export-format", "c=raw", "--socket", at("s"), "--address", "127.0.0.1:0")
	tcp := regexp.MustCompile(`nbd://127\.0\.0\.1:\d+/`).FindString(lines[0])
	if tcp == "" {
		t.Fatalf("no address in %q", lines)
	}
	unix := "nbd+unix:///%?socket=" + at("s")
	uri := func(name string) string { return strings.Replace(unix, "%", name, 1) }
	tool(t, qemuIO, "-f", "raw", "-c", "write -P 1 0 64k", uri(""))
	tool(t, qemuIO, "-f", "raw", "-c", "write -P 2 15M 64k", tcp+"b")
	tool(t, qemuIO, "-f", "raw", "-c", "write -P 3 0 64k", uri("c"))
	if list := tool(t, nbdinfo, "--list", uri("")); !strings.Contains(list, `export="b"`) || !strings.Contains(list, `export="c"`) {
		t.Errorf("nbdinfo --list:\n%s", list)
	}
	if size := strings.TrimSpace(tool(t, nbdinfo, "--size", tcp+"c")); size != "1048576" {
		t.Errorf("size of c: %s", size)
	}
	if out, err := exec.Command(nbdinfo, "--size", uri("d")).CombinedOutput(); err == nil {
		t.Errorf("an export that isn't there: %s", out)
	}
	if code := s.end(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d: %s", code, &s.stderr)
	}
	for image, check := range map[string]string{"a.vmdk": "read -P 1 0 64k", "b.qcow2": "read -P 2 15M 64k"} {
		tool(t, qemuIO, "-r", "-c", check, at(image))
	}
	tool(t, qemuIO, "-r", "-f", "raw", "-c", "read -P 3 0 64k", at("c.raw"))
}

// TestServe_RefusesOptions: what cannot be, or should not, is refused before an image is
// opened.
func TestServe_RefusesOptions(t *testing.T) {
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "s")
	ok(t, "image", "create", image, "1M")
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{image}, "--socket"},
		{[]string{"--socket", socket}, "nothing to serve"},
		{[]string{"--socket", socket, "--export", image}, "want NAME=FILE"},
		{[]string{"--socket", socket, "--export", "=" + image}, "want NAME=FILE"},
		{[]string{"--socket", socket, "--export", "a=" + image, "--export", "a=" + image}, "in use"},
		{[]string{"--read-only", "--socket", socket, "--export", "a=" + image, "--export", "a=" + image}, "already exists"},
		{[]string{image, "--socket", socket, "--export-format", "b=raw"}, "--export-format b=raw"},
		{[]string{image, "--socket", socket, "--max-clients", "0"}, "--max-clients"},
		{[]string{image, "--socket", socket, "--tls-psk", "keys.psk"}, "pre-shared keys"},
		{[]string{image, "--socket", socket, "--tls", "require"}, "--tls-certificates"},
		{[]string{image, "--socket", socket, "--tls", "sometimes"}, "off, on or require"},
		{[]string{image, "--socket", socket, "--tls", "off", "--tls-certificates", dir}, "one or the other"},
		{[]string{image, "--socket", socket, "--tls-certificates", dir}, "server-cert.pem"},
		{[]string{image, "--socket", socket, "--tls-verify-peer"}, "--tls-certificates"},
		{[]string{image, "--socket", socket, "--tls", "on", "--tls-verify-peer", "--tls-certificates", dir}, "--tls require"},
		{[]string{image, "--address", "127.0.0.1"}, "--address 127.0.0.1"},
	} {
		r := run(t, append([]string{"serve", "--run-dir", filepath.Join(dir, "run")}, tc.args...)...)
		if r.code != 1 || !strings.Contains(r.stderr, tc.want) {
			t.Errorf("serve %v: exit code %d, %q, want something about %q", tc.args, r.code, r.stderr, tc.want)
		}
	}
}

// TestServe_WarnsOfOpenAddress: an address that strangers reach is warned of, unless they
// must prove who they are.
func TestServe_WarnsOfOpenAddress(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "x.vmdk")
	ok(t, "image", "create", image, "1M")
	for address, warns := range map[string]bool{":0": true, "127.0.0.1:0": false} {
		s, _ := startExports(t, 1, image, "--read-only", "--address", address)
		s.end(syscall.SIGTERM)
		if got := strings.Contains(s.stderr.String(), "everybody"); got != warns {
			t.Errorf("--address %s: warning %v\n%s", address, got, &s.stderr)
		}
	}
}

// makeCertificates writes a directory of certificates for a server called localhost.
func makeCertificates(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	put := func(name, kind string, der []byte) {
		writeFile(t, filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	var parent *x509.Certificate
	var parentKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		cert := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			BasicConstraintsValid: true, IsCA: i == 0, KeyUsage: x509.KeyUsageDigitalSignature}
		if i == 0 {
			cert.KeyUsage = x509.KeyUsageCertSign
			parent, parentKey = cert, key
		} else {
			cert.DNSNames, cert.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
			cert.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		}
		der, err := x509.CreateCertificate(rand.Reader, cert, parent, &key.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		put(name+"-cert.pem", "CERTIFICATE", der)
		put(name+"-key.pem", "PRIVATE KEY", keyDER)
	}
	return dir
}

// TestServe_TLS: other people's clients are served by TLS, with certificates on both
// sides, and not without.
func TestServe_TLS(t *testing.T) {
	nbdinfo, nbdcopy, qemuImg := testenv.Oracle(t, "nbdinfo"), testenv.Oracle(t, "nbdcopy"), testenv.Oracle(t, "qemu-img")
	certificates, dir := makeCertificates(t), t.TempDir()
	image, socket := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "s")
	ok(t, "image", "create", image, "10M")
	content := filepath.Join(dir, "content")
	writeFile(t, content, bytes.Repeat([]byte("secret, "), 10<<17))
	_, lines := startExports(t, 1, image, "--socket", socket, "--address", "127.0.0.1:0", "--tls-certificates", certificates, "--tls-verify-peer")
	address := regexp.MustCompile(`nbds://127\.0\.0\.1:(\d+)/`).FindStringSubmatch(lines[0])
	if address == nil {
		t.Fatalf("no address in %q", lines)
	}
	tcp, unix := "nbds://localhost:"+address[1]+"/?tls-certificates="+certificates, "nbds+unix:///?socket="+socket+"&tls-certificates="+certificates
	tool(t, nbdcopy, content, tcp)
	back := filepath.Join(dir, "back")
	tool(t, nbdcopy, unix, back)
	got, err := os.ReadFile(back)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := os.ReadFile(content); !bytes.Equal(got, want) {
		t.Error("what came back by TLS differs")
	}
	if info := tool(t, nbdinfo, tcp); !strings.Contains(info, "with TLS") {
		t.Errorf("nbdinfo:\n%s", info)
	}
	tool(t, qemuImg, "compare", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+certificates, "--image-opts",
		"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port="+address[1]+",tls-creds=t", "driver=raw,file.driver=file,file.filename="+content)
	stranger := makeCertificates(t)
	for what, uri := range map[string]string{
		"without TLS":                          "nbd+unix:///?socket=" + socket,
		"with another authority's certificate": "nbds+unix:///?socket=" + socket + "&tls-certificates=" + stranger,
	} {
		if out, err := exec.Command(nbdinfo, uri).CombinedOutput(); err == nil {
			t.Errorf("%s, a client is served:\n%s", what, out)
		}
	}
}

// TestServe_HostileClients: clients that break the protocol are hung up on and logged, at a
// bounded rate, and others are served.
func TestServe_HostileClients(t *testing.T) {
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "s")
	ok(t, "image", "create", image, "1M")
	s, _ := startExports(t, 1, image, "--socket", socket)
	for i := range 500 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		if _, err := conn.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 1+i%50)); err == nil {
			_, _ = io.Copy(io.Discard, conn)
		}
		_ = conn.Close()
	}
	if out, err := exec.Command(testenv.Oracle(t, "nbdinfo"), "nbd+unix:///?socket="+socket).CombinedOutput(); err != nil {
		t.Errorf("nbdinfo: %v\n%s", err, out)
	}
	if code := s.end(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	lines := strings.Count(s.stderr.String(), "hung up on")
	if lines == 0 || lines > 50 {
		t.Errorf("%d lines about 500 hostile clients:\n%s", lines, &s.stderr)
	}
}

// TestServe_NBDClientLists: the kernel driver's own client understands the handshake.
func TestServe_NBDClientLists(t *testing.T) {
	client := testenv.Oracle(t, "nbd-client")
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "s")
	ok(t, "image", "create", image, "1M")
	startExports(t, 1, "--export", "disk="+image, "--socket", socket)
	if out := tool(t, client, "-l", "-u", socket); !strings.Contains(out, "disk") {
		t.Errorf("nbd-client -l:\n%s", out)
	}
}
