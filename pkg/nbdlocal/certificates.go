package nbdlocal

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// LoadTLS reads what [ExportsOptions] needs for TLS from a directory, in PEM, by the names
// that other NBD servers use:
//
//	server-cert.pem, server-key.pem   the server's certificate, with what leads to its authority, and its key
//	ca-cert.pem                       the authority of clients' certificates
//	ca-crl.pem                        those that it has revoked; may be missing
//
// With verifyClients a client needs a certificate of that authority; without, the last
// two are not read. TLS is 1.2 or later. The files are read once.
func LoadTLS(dir string, verifyClients bool) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("load the server's certificate from %s: %w", dir, err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	if !verifyClients {
		return config, nil
	}
	authorities, err := readCertificates(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return nil, err
	}
	config.ClientCAs = x509.NewCertPool()
	for _, a := range authorities {
		config.ClientCAs.AddCert(a)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	revoked, err := readRevocations(filepath.Join(dir, "ca-crl.pem"), authorities)
	if err != nil {
		return nil, err
	}
	if revoked != nil {
		// VerifyConnection, not VerifyPeerCertificate: that isn't asked when a session
		// is resumed.
		config.VerifyConnection = func(state tls.ConnectionState) error { return checkRevoked(state, revoked) }
	}
	return config, nil
}

// readCertificates reads a file of certificates.
func readCertificates(path string) ([]*x509.Certificate, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list []*x509.Certificate
	for b, rest := pem.Decode(content); b != nil; b, rest = pem.Decode(rest) {
		if b.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, cert)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: %w: want certificates in PEM", path, block.ErrInvalid)
	}
	return list, nil
}

// revocation is a certificate that its authority has revoked.
type revocation struct{ issuer, serial string }

// readRevocations reads a file of revocation lists. It returns nil if there is none.
func readRevocations(path string, authorities []*x509.Certificate) (map[revocation]bool, error) {
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	revoked := map[revocation]bool{}
	count := 0
	for b, rest := pem.Decode(content); b != nil; b, rest = pem.Decode(rest) {
		list, err := x509.ParseRevocationList(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if err := checkRevocationList(list, authorities); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, entry := range list.RevokedCertificateEntries {
			revoked[revocation{string(list.RawIssuer), entry.SerialNumber.String()}] = true
		}
		count++
	}
	if count == 0 {
		return nil, fmt.Errorf("%s: %w: want revocation lists in PEM", path, block.ErrInvalid)
	}
	return revoked, nil
}

// checkRevocationList returns nil for a list that one of the authorities signed and that
// is not out of date.
func checkRevocationList(list *x509.RevocationList, authorities []*x509.Certificate) error {
	if !list.NextUpdate.IsZero() && time.Now().After(list.NextUpdate) {
		return fmt.Errorf("revocation list: %w: it was to be replaced by %s", block.ErrInvalid, list.NextUpdate.Format(time.RFC3339))
	}
	for _, a := range authorities {
		if bytes.Equal(a.RawSubject, list.RawIssuer) && list.CheckSignatureFrom(a) == nil {
			return nil
		}
	}
	return fmt.Errorf("revocation list: %w: none of the authorities has signed it", block.ErrInvalid)
}

// checkRevoked refuses a client of whose certificates, in every chain, one is revoked.
func checkRevoked(state tls.ConnectionState, revoked map[revocation]bool) error {
	for _, chain := range state.VerifiedChains {
		good := true
		for _, cert := range chain {
			good = good && !revoked[revocation{string(cert.RawIssuer), cert.SerialNumber.String()}]
		}
		if good {
			return nil
		}
	}
	return errors.New("the client's certificate has been revoked")
}
