package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// certificateLife is longer than anybody keeps a cluster up.
const certificateLife = 365 * 24 * time.Hour

// authority signs a cluster's certificates.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// newAuthority makes one and writes ca.crt and ca.key to dir.
func newAuthority(dir string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	template := newTemplate(pkix.Name{CommonName: "imgdisk test cluster"})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	a := &authority{dir: dir}
	pair, err := a.sign("ca", template)
	if err != nil {
		return nil, err
	}
	a.pem = pair.cert
	return a, nil
}

func newTemplate(subject pkix.Name) *x509.Certificate {
	// Clocks of machines may be behind a little.
	now := time.Now().Add(-time.Hour)
	return &x509.Certificate{Subject: subject, NotBefore: now, NotAfter: now.Add(certificateLife)}
}

// keyPair is a certificate and its key as PEM.
type keyPair struct {
	cert, key []byte
}

// sign makes a key and its certificate, and writes them as NAME.crt and NAME.key. The first
// certificate of an authority is its own.
func (a *authority) sign(name string, template *x509.Certificate) (keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return keyPair{}, err
	}
	parent, parentKey := a.cert, a.key
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		return keyPair{}, fmt.Errorf("sign certificate %s: %w", name, err)
	}
	if a.cert == nil {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			return keyPair{}, err
		}
		a.key = key
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return keyPair{}, err
	}
	pair := keyPair{
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}
	if err := os.WriteFile(filepath.Join(a.dir, name+".crt"), pair.cert, 0o600); err != nil {
		return keyPair{}, err
	}
	return pair, os.WriteFile(filepath.Join(a.dir, name+".key"), pair.key, 0o600)
}

// server makes a certificate for a server at some addresses and names.
func (a *authority) server(name string, addresses, names []string) error {
	template := newTemplate(pkix.Name{CommonName: name})
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	template.DNSNames = names
	for _, address := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(address))
	}
	_, err := a.sign(name, template)
	return err
}

// client makes a certificate with which someone is known to the API server.
func (a *authority) client(name, user, group string) (keyPair, error) {
	subject := pkix.Name{CommonName: user}
	if group != "" {
		subject.Organization = []string{group}
	}
	template := newTemplate(subject)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return a.sign(name, template)
}

// kubeconfig returns a configuration, with all in it, with which that someone reaches an
// API server at an address.
func (a *authority) kubeconfig(name, user, group, address string) ([]byte, error) {
	pair, err := a.client(name, user, group)
	if err != nil {
		return nil, err
	}
	const entry = "imgdisk"
	config := clientcmdapi.NewConfig()
	config.Clusters[entry] = &clientcmdapi.Cluster{
		Server:                   "https://" + net.JoinHostPort(address, apiPort),
		CertificateAuthorityData: a.pem,
	}
	config.AuthInfos[entry] = &clientcmdapi.AuthInfo{ClientCertificateData: pair.cert, ClientKeyData: pair.key}
	config.Contexts[entry] = &clientcmdapi.Context{Cluster: entry, AuthInfo: entry}
	config.CurrentContext = entry
	return clientcmd.Write(*config)
}
