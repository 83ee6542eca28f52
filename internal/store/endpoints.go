package store

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// etcdPort is where members answer clients unless told otherwise.
const etcdPort = "2379"

// EtcdConfig is what OpenEtcd needs.
type EtcdConfig struct {
	// Endpoints are the cluster's members: etcd://host:2379,host2:2379, or
	// etcds:// for TLS.
	Endpoints string
	// CA is a file with the authorities that members' certificates are checked
	// by; empty: those of the system. Cert and Key are files with the
	// certificate that this host shows, if members ask for one.
	CA, Cert, Key string
	// User and Password are etcd's own; empty: none are asked for.
	User, Password string
	// Prefix comes before every key; empty: /weft/v1/.
	Prefix string
	Log    logrus.FieldLogger
}

// client checks the settings.
func (c EtcdConfig) client() (cc clientv3.Config, err error) {
	if (c.User == "") != (c.Password == "") {
		return cc, errors.New("a user needs a password, and a password a user")
	}
	hosts, secure, err := parseEndpoints(c.Endpoints)
	if err != nil {
		return cc, err
	}
	scheme := "http://"
	if secure {
		scheme = "https://"
		cc.TLS, err = c.tls()
	} else if c.CA != "" || c.Cert != "" || c.Key != "" {
		err = errors.New("there are TLS files, but etcd:// does without TLS: write etcds://")
	}
	for _, h := range hosts {
		cc.Endpoints = append(cc.Endpoints, scheme+h)
	}
	return cc, err
}

func parseEndpoints(s string) (hosts []string, secure bool, err error) {
	const want = "want etcd://host:2379,host2:2379, or etcds:// for TLS"
	scheme, list, ok := strings.Cut(s, "://")
	if !ok || scheme != "etcd" && scheme != "etcds" {
		return nil, false, errors.New(want)
	}
	for h := range strings.SplitSeq(list, ",") {
		host, port, err := net.SplitHostPort(h)
		if err != nil {
			host, port = strings.Trim(h, "[]"), etcdPort
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || host == "" || strings.ContainsAny(host, "/@ []") {
			return nil, false, fmt.Errorf("%q is not a host and port: %s", h, want)
		}
		hosts = append(hosts, net.JoinHostPort(host, port))
	}
	return hosts, scheme == "etcds", nil
}

func (c EtcdConfig) tls() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("read CA: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA: %s has no certificate in PEM form", c.CA)
		}
	}
	if c.Cert == "" && c.Key == "" {
		return t, nil
	}
	// Read for each connection, so that a renewed one needs no restart; and
	// here once, so that a wrong name is told at the start.
	load := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("read certificate %q and key %q: %w", c.Cert, c.Key, err)
		}
		return &pair, nil
	}
	t.GetClientCertificate = load
	_, err := load(nil)
	return t, err
}
