package etcdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Authority signs certificates.
type Authority struct {
	File string // its own certificate

	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

// NewAuthority makes one whose files end with the test.
func NewAuthority(tb testing.TB) *Authority {
	tb.Helper()
	a := &Authority{dir: tb.TempDir(), key: newKey(tb), pool: x509.NewCertPool()}
	a.cert = &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der := a.sign(tb, a.cert, "weft test authority", a.key)
	var err error
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		tb.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	a.File = a.write(tb, "ca.pem", "CERTIFICATE", der)
	return a
}

// Issue makes a certificate for servers at these addresses, and for clients.
func (a *Authority) Issue(tb testing.TB, hosts []string) (cert, key string) {
	tb.Helper()
	t := &x509.Certificate{
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, h := range hosts {
		t.IPAddresses = append(t.IPAddresses, net.IP(netip.MustParseAddr(h).AsSlice()))
	}
	k := newKey(tb)
	cert = a.write(tb, "cert.pem", "CERTIFICATE", a.sign(tb, t, "weft test", k))
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		tb.Fatal(err)
	}
	return cert, a.write(tb, "key.pem", "EC PRIVATE KEY", der)
}

func (a *Authority) sign(tb testing.TB, t *x509.Certificate, name string, k *ecdsa.PrivateKey) []byte {
	tb.Helper()
	t.SerialNumber = big.NewInt(time.Now().UnixNano())
	t.Subject = pkix.Name{CommonName: name}
	t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, &k.PublicKey, a.key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func (a *Authority) write(tb testing.TB, name, kind string, der []byte) string {
	tb.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}
