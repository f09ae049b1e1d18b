package nbdlocal

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority makes certificates for tests.
type authority struct {
	tb   testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	next int64
}

func newAuthority(tb testing.TB) *authority {
	a := &authority{tb: tb, next: 2}
	a.key = a.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId: []byte{1, 2, 3},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		tb.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		tb.Fatal(err)
	}
	return a
}

func (a *authority) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.tb.Fatal(err)
	}
	return key
}

// issue makes a certificate of a name and its key, as PEM.
func (a *authority) issue(name string) (cert, key []byte) {
	a.tb.Helper()
	private := a.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	a.next++
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &private.PublicKey, a.key)
	if err != nil {
		a.tb.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.tb.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// directory writes what clients and servers find in a directory of certificates.
func (a *authority) directory() string {
	a.tb.Helper()
	dir := a.tb.TempDir()
	files := map[string][]byte{"ca-cert.pem": a.pem()}
	files["server-cert.pem"], files["server-key.pem"] = a.issue("localhost")
	files["client-cert.pem"], files["client-key.pem"] = a.issue("client")
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			a.tb.Fatal(err)
		}
	}
	return dir
}

// revoke writes a revocation list of certificates into a directory.
func (a *authority) revoke(dir string, serials ...int64) {
	a.tb.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca-crl.pem"), pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), 0o600); err != nil {
		a.tb.Fatal(err)
	}
}

// tlsExports serves a device with TLS. The client's end of the problem goes to problems.
func tlsExports(t *testing.T, dir string, verify, required bool) (e *Exports, problems chan error) {
	t.Helper()
	config, err := LoadTLS(dir, verify)
	if err != nil {
		t.Fatal(err)
	}
	problems = make(chan error, 100)
	return exportsOf(t, "", NewServer(newMemDevice(32*mib), Options{}), ExportsOptions{
		TLS: config, TLSRequired: required, ClientError: func(err error) { problems <- err }}), problems
}

// secure makes a client's connection a TLS one.
func (c *client) secure(dir string, withCertificate bool) error {
	c.tb.Helper()
	if got := c.option(optStartTLS, nil); got[0].kind != repAck {
		c.tb.Fatalf("STARTTLS: %+v", got)
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		c.tb.Fatal(err)
	}
	roots.AppendCertsFromPEM(ca)
	config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	if withCertificate {
		cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
		if err != nil {
			c.tb.Fatal(err)
		}
		config.Certificates = []tls.Certificate{cert}
	}
	secure := tls.Client(c.conn, config)
	if err := secure.Handshake(); err != nil {
		return err
	}
	c.conn = secure
	return nil
}

// TestTLS_Serves: a secure connection does everything that a plain one does, large
// requests and several at once included.
func TestTLS_Serves(t *testing.T) {
	dir := newAuthority(t).directory()
	e, _ := tlsExports(t, dir, false, true)
	c, _ := exportsClient(t, e)
	c.greet(flagFixedNewstyle | flagNoZeroes)
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	if got := c.option(optStartTLS, nil); got[0].kind != repErrInvalid {
		t.Errorf("STARTTLS again: %+v", got)
	}
	c.option(optExtendedHeaders, nil)
	c.structured, c.extended = true, true
	c.goTo("")
	data := bytes.Repeat([]byte("0123456789abcde"), 3*mib/15)
	c.write(77, data)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := range 40 {
			_, _ = c.conn.Write(extendedHeader(cmdRead, 0, uint64(1000+i), 77, uint64(len(data))))
		}
	}()
	for i := range 40 {
		c.sent[uint64(1000+i)] = command{cmd: cmdRead, off: 77, n: len(data)}
	}
	for range 40 {
		a, err := c.receive()
		if err != nil || !bytes.Equal(a.data, data) {
			t.Fatalf("read: %v, %v", err, a.errno)
		}
	}
	<-sent
	c.send(cmdDisc, 0, 0, 0, nil)
	if _, err := c.conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after DISC: %v, want an end that nobody has forged", err)
	}
}

func TestTLS_Required(t *testing.T) {
	dir := newAuthority(t).directory()
	e, _ := tlsExports(t, dir, false, true)
	c, socket := exportsClient(t, e)
	c.greet(flagFixedNewstyle)
	for option, data := range map[uint32][]byte{
		optList: nil, optInfo: infoData(""), optGo: infoData(""), optStructuredReply: nil, optExtendedHeaders: nil,
		optListMetaContext: contextData(""), optSetMetaContext: contextData(""), 4711: nil,
	} {
		if got := c.option(option, data); len(got) != 1 || got[0].kind != repErrTLSReqd {
			t.Errorf("option %d without TLS: %+v", option, got)
		}
	}
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	c.goTo("")
	old := dialClient(t, socket)
	old.greet(flagFixedNewstyle)
	old.sendOption(optExportName, nil)
	if n, err := io.ReadFull(old.conn, make([]byte, 10)); err == nil || n > 0 {
		t.Errorf("EXPORT_NAME without TLS: %d bytes", n)
	}
}

// TestTLS_Optional: both kinds of client are served, and what was said before TLS doesn't
// count after it.
func TestTLS_Optional(t *testing.T) {
	dir := newAuthority(t).directory()
	e, _ := tlsExports(t, dir, false, false)
	plain, socket := exportsClient(t, e)
	plain.enter(true)
	plain.write(0, []byte("both"))
	c := dialClient(t, socket)
	c.greet(flagFixedNewstyle)
	c.option(optStructuredReply, nil)
	c.option(optSetMetaContext, contextData("", "base:allocation"))
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	if got := c.option(optSetMetaContext, contextData("", "base:allocation")); got[0].kind != repErrInvalid {
		t.Errorf("structured replies survive STARTTLS: %+v", got)
	}
	c.goTo("")
	if got := c.read(0, 4); string(got) != "both" {
		t.Errorf("read %q", got)
	}
}

func TestTLS_ClientCertificates(t *testing.T) {
	good := newAuthority(t)
	dir, strange, revoked := good.directory(), newAuthority(t).directory(), good.directory()
	good.revoke(dir, 5) // the client's in revoked: two certificates for each directory
	if err := os.WriteFile(filepath.Join(strange, "ca-cert.pem"), good.pem(), 0o600); err != nil {
		t.Fatal(err) // it trusts the server, and has a certificate of somebody else
	}
	for _, tc := range []struct {
		name, dir   string
		certificate bool
		problem     string
	}{
		{"with one", dir, true, ""},
		{"without", dir, false, "certificate"},
		{"with another authority's", strange, true, "certificate"},
		{"with a revoked one", revoked, true, "revoked"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e, problems := tlsExports(t, dir, true, true)
			c, _ := exportsClient(t, e)
			c.greet(flagFixedNewstyle)
			err := c.secure(tc.dir, tc.certificate)
			if err == nil { // the server's verdict comes with the first read
				_, err = c.conn.Write(optionBytes(optList, nil))
			}
			if err == nil {
				_, err = io.ReadFull(c.conn, make([]byte, 20))
			}
			if (err == nil) != (tc.problem == "") {
				t.Errorf("client: %v", err)
			}
			if tc.problem != "" {
				if err := <-problems; !strings.Contains(err.Error(), tc.problem) {
					t.Errorf("server: %v, want something about %q", err, tc.problem)
				}
			}
		})
	}
}

// TestTLS_BrokenClients: a client that breaks off, or sends what isn't TLS, ends its
// connection and nothing else.
func TestTLS_BrokenClients(t *testing.T) {
	dir := newAuthority(t).directory()
	e, problems := tlsExports(t, dir, false, true)
	_, socket := exportsClient(t, e)
	start := func() *client {
		c := dialClient(t, socket)
		c.greet(flagFixedNewstyle)
		return c
	}
	c := start()
	c.option(optStartTLS, nil)
	_, _ = c.conn.Write(bytes.Repeat([]byte("this is not TLS"), 1000))
	if err := <-problems; !strings.Contains(err.Error(), "start TLS") {
		t.Errorf("garbage: %v", err)
	}
	c = start()
	raw := c.conn
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	c.goTo("")
	c.read(0, 1)
	_, _ = raw.Write([]byte("nor is this any more, and it is longer than a record's header"))
	if err := <-problems; !strings.Contains(err.Error(), "TLS") {
		t.Errorf("garbage in a session: %v", err)
	}
	c = start()
	raw = c.conn
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	c.goTo("")
	_, _ = c.conn.Write(requestHeader(cmdWrite, 0, 1, 0, 1000)) // and not a byte of it
	_ = raw.Close()
	if err := <-problems; !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a client that breaks off: %v", err)
	}
	c = start()
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	c.goTo("")
	c.read(0, 1)
}

// TestTLS_DrainAnswers: what was taken is answered before a secure connection ends.
func TestTLS_DrainAnswers(t *testing.T) {
	dir := newAuthority(t).directory()
	config, err := LoadTLS(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(string, int64, int64) error { g.wait(); return nil }
	e := exportsOf(t, "", NewServer(dev, Options{}), ExportsOptions{TLS: config})
	c, _ := exportsClient(t, e)
	c.greet(flagFixedNewstyle)
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	c.goTo("")
	for i := range 5 {
		c.send(cmdRead, 0, int64(i), 1, nil)
	}
	<-g.entered
	server := e.all()[0].server
	if !eventually(func() bool { return server.Stats().InFlight == 5 }) {
		t.Fatalf("%d in flight", server.Stats().InFlight)
	}
	drained := make(chan error, 1)
	go func() { drained <- e.Drain(context.Background()) }()
	g.open()
	for range 5 {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
}

func TestLoadTLS_Problems(t *testing.T) {
	a := newAuthority(t)
	for _, tc := range []struct {
		name   string
		verify bool
		spoil  func(dir string) error
		want   string
	}{
		{"no certificate", false, func(dir string) error { return os.Remove(filepath.Join(dir, "server-cert.pem")) }, "server-cert.pem"},
		{"no key", false, func(dir string) error { return os.Remove(filepath.Join(dir, "server-key.pem")) }, "server-key.pem"},
		{"key of another", false, func(dir string) error {
			_, key := a.issue("other")
			return os.WriteFile(filepath.Join(dir, "server-key.pem"), key, 0o600)
		}, "private key"},
		{"no authority", true, func(dir string) error { return os.Remove(filepath.Join(dir, "ca-cert.pem")) }, "ca-cert.pem"},
		{"authority is not a certificate", true, func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "ca-cert.pem"), []byte("nonsense"), 0o600)
		}, "ca-cert.pem"},
		{"revocation list is none", true, func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "ca-crl.pem"), []byte("nonsense"), 0o600)
		}, "ca-crl.pem"},
		{"revocation list of somebody else", true, func(dir string) error { newAuthority(t).revoke(dir, 1); return nil }, "ca-crl.pem"},
	} {
		dir := a.directory()
		if err := tc.spoil(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadTLS(dir, tc.verify); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want something about %q", tc.name, err, tc.want)
		}
	}
	dir := a.directory()
	if err := os.Remove(filepath.Join(dir, "ca-cert.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadTLS(dir, false); err != nil {
		t.Errorf("without an authority, and no client to verify: %v", err)
	}
}
