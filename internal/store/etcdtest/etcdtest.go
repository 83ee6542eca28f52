// Package etcdtest runs a real etcd cluster for a test.
//
// It owns the members' processes, their data and their certificates, for the
// length of one test. Each member has a loopback address of its own and etcd's
// usual ports there, so that a member that is stopped and started again finds
// its port free. It is never imported outside tests.
//
// Without etcd on the PATH (Debian: etcd-server) a test is skipped, visibly; with
// REQUIRE_NETNS=1 in the environment it fails instead.
//
// Start with [Start].
package etcdtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// startTime is how long members may take until they have a leader.
const startTime = 30 * time.Second

// Config is what Start needs; the zero value is one open member.
type Config struct {
	Members int  // 0 means 1
	TLS     bool // and clients must show a certificate
}

// Cluster is a running cluster. Its methods fail the test, and return when what
// they do has happened.
type Cluster struct {
	// Endpoints are all members, as in store.EtcdConfig. The files are set with
	// TLS.
	Endpoints     string
	CA, Cert, Key string

	tb      testing.TB
	members []*member
	admin   *clientv3.Client
}

type member struct {
	name string
	host string
	url  string // for clients
	args []string
	cmd  *exec.Cmd
	log  *bytes.Buffer
	done chan struct{} // closed when the process has ended
}

// Start starts a cluster that ends with the test.
func Start(tb testing.TB, config Config) *Cluster {
	tb.Helper()
	binary, err := exec.LookPath("etcd")
	if err != nil {
		tb.Fatalf("%v: hack/deps.sh installs it", err)
	}
	n := max(config.Members, 1)
	c := &Cluster{tb: tb}
	hosts := freeHosts(tb, n)
	scheme, admin := "http", clientv3.Config{Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second}}),
	}}
	if config.TLS {
		scheme = "https"
		admin.TLS = c.certificates(hosts)
	}
	dir := tb.TempDir()
	var peers, clients []string
	for i, h := range hosts {
		peers = append(peers, fmt.Sprintf("m%d=http://%s", i, net.JoinHostPort(h, "2380")))
		clients = append(clients, net.JoinHostPort(h, "2379"))
	}
	c.Endpoints = strings.Replace(scheme, "http", "etcd", 1) + "://" + strings.Join(clients, ",")
	for i, h := range hosts {
		m := &member{name: fmt.Sprintf("m%d", i), host: h, url: scheme + "://" + clients[i]}
		peer := "http://" + net.JoinHostPort(h, "2380")
		m.args = []string{
			binary, "--name", m.name, "--data-dir", filepath.Join(dir, m.name), "--log-level", "warn", "--logger", "zap",
			"--listen-client-urls", m.url, "--advertise-client-urls", m.url,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(peers, ","), "--initial-cluster-token", dir,
		}
		if config.TLS {
			m.args = append(m.args, "--cert-file", c.Cert, "--key-file", c.Key, "--trusted-ca-file", c.CA, "--client-cert-auth")
		}
		c.members = append(c.members, m)
		admin.Endpoints = append(admin.Endpoints, m.url)
	}
	tb.Cleanup(c.end)
	for i := range c.members {
		c.run(i)
	}
	if c.admin, err = clientv3.New(admin); err != nil {
		tb.Fatalf("connect to etcd: %v", err)
	}
	for i := range c.members {
		c.wait(i)
	}
	return c
}

// freeHosts are addresses of which 127.0.0.0/8 has enough for all tests that run
// at a time, and whose ports no outgoing connection takes.
func freeHosts(tb testing.TB, n int) []string {
	tb.Helper()
	for range 100 {
		net24 := fmt.Sprintf("127.%d.%d.", 1+rand.IntN(254), rand.IntN(256))
		l, err := net.Listen("tcp", net.JoinHostPort(net24+"1", "2379"))
		if err != nil {
			continue
		}
		_ = l.Close()
		var hosts []string
		for i := range n {
			hosts = append(hosts, fmt.Sprintf("%s%d", net24, i+1))
		}
		return hosts
	}
	tb.Fatal("no free loopback address")
	return nil
}

// run starts a member's process.
func (c *Cluster) run(i int) {
	c.tb.Helper()
	m := c.members[i]
	m.log, m.done = &bytes.Buffer{}, make(chan struct{})
	m.cmd = exec.Command(m.args[0], m.args[1:]...)
	m.cmd.Stdout, m.cmd.Stderr = m.log, m.log
	if runtime.GOARCH != "amd64" { // else 3.4 refuses to start
		m.cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH="+runtime.GOARCH)
	}
	// Also a test binary that is killed leaves no member behind.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		c.tb.Fatalf("start etcd: %v", err)
	}
	go func(cmd *exec.Cmd, done chan struct{}) {
		_ = cmd.Wait() // it is killed, mostly
		close(done)
	}(m.cmd, m.done)
}

// wait waits until a member answers, which it does when there is a leader.
func (c *Cluster) wait(i int) {
	c.tb.Helper()
	m := c.members[i]
	ctx, cancel := context.WithTimeout(c.tb.Context(), startTime)
	defer cancel()
	for {
		try, stop := context.WithTimeout(ctx, time.Second)
		s, err := c.admin.Status(try, m.url)
		stop()
		if err == nil && s.Leader != 0 {
			return
		}
		select {
		case <-m.done:
			c.tb.Fatalf("etcd %s has ended:\n%s", m.name, m.log)
		case <-ctx.Done():
			c.kill(m)
			c.tb.Fatalf("etcd %s does not answer (%v):\n%s", m.name, err, m.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *Cluster) end() {
	if c.admin != nil {
		_ = c.admin.Close()
	}
	for _, m := range c.members {
		if m.cmd != nil && m.cmd.Process != nil {
			c.kill(m)
		}
		if c.tb.Failed() && m.log != nil {
			c.tb.Logf("etcd %s:\n%s", m.name, m.log.Bytes()[max(m.log.Len()-4096, 0):])
		}
	}
}

// kill also ends a frozen process. One that has ended already is no error.
func (c *Cluster) kill(m *member) {
	_ = m.cmd.Process.Kill()
	<-m.done
}

// Kill ends a member without a warning.
func (c *Cluster) Kill(i int) { c.kill(c.members[i]) }

// Stop ends a member as its service would.
func (c *Cluster) Stop(i int) {
	c.tb.Helper()
	c.signal(i, syscall.SIGTERM)
	<-c.members[i].done
}

// Start starts a member again, with its data.
func (c *Cluster) Start(i int) {
	c.tb.Helper()
	c.run(i)
}

// Wait waits until all members that run know a leader.
func (c *Cluster) Wait() {
	c.tb.Helper()
	for i, m := range c.members {
		select {
		case <-m.done:
		default:
			c.wait(i)
		}
	}
}

// StopAll ends every member, StartAll starts them again and waits for a leader.
func (c *Cluster) StopAll() {
	c.tb.Helper()
	for i := range c.members {
		c.signal(i, syscall.SIGTERM)
	}
	for _, m := range c.members {
		<-m.done
	}
}

// StartAll is the other half of StopAll.
func (c *Cluster) StartAll() {
	c.tb.Helper()
	for i := range c.members {
		c.run(i)
	}
	c.Wait()
}

// Freeze makes a member hang: its connections stay and nothing answers.
func (c *Cluster) Freeze(i int) {
	c.tb.Helper()
	c.signal(i, syscall.SIGSTOP)
}

// Thaw lets a frozen member go on.
func (c *Cluster) Thaw(i int) {
	c.tb.Helper()
	c.signal(i, syscall.SIGCONT)
}

func (c *Cluster) signal(i int, s syscall.Signal) {
	c.tb.Helper()
	if err := c.members[i].cmd.Process.Signal(s); err != nil {
		c.tb.Fatalf("%s to etcd %s: %v", s, c.members[i].name, err)
	}
}

// Leader is the member that leads.
func (c *Cluster) Leader() int {
	c.tb.Helper()
	for i, m := range c.members {
		if s, err := c.admin.Status(c.tb.Context(), m.url); err == nil && s.Header.MemberId == s.Leader {
			return i
		}
	}
	c.tb.Fatal("etcd has no leader")
	return 0
}

// Client has all rights, for what weft itself never does.
func (c *Cluster) Client() *clientv3.Client { return c.admin }

// Compact makes etcd forget every revision but the last.
func (c *Cluster) Compact() {
	c.tb.Helper()
	now, err := c.admin.Get(c.tb.Context(), "none")
	if err == nil {
		_, err = c.admin.Compact(c.tb.Context(), now.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err != nil {
		c.tb.Fatalf("compact etcd: %v", err)
	}
}

// Protect makes the cluster ask for a password, and adds a user who may do
// everything below a prefix, and nothing else.
func (c *Cluster) Protect(user, password, prefix string) {
	c.tb.Helper()
	ctx := c.tb.Context()
	end := clientv3.GetPrefixRangeEnd(prefix)
	for _, step := range []func() error{
		func() error { _, err := c.admin.UserAdd(ctx, "root", "root"); return err },
		func() error { _, err := c.admin.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.admin.RoleAdd(ctx, user); return err },
		func() error {
			_, err := c.admin.RoleGrantPermission(ctx, user, prefix, end, clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := c.admin.UserAdd(ctx, user, password); return err },
		func() error { _, err := c.admin.UserGrantRole(ctx, user, user); return err },
		func() error { _, err := c.admin.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			c.tb.Fatalf("protect etcd: %v", err)
		}
	}
}

// certificates makes an authority, and one certificate for all members and
// clients.
func (c *Cluster) certificates(hosts []string) *tls.Config {
	c.tb.Helper()
	ca := NewAuthority(c.tb)
	c.CA = ca.File
	c.Cert, c.Key = ca.Issue(c.tb, hosts)
	pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
	if err != nil {
		c.tb.Fatal(err)
	}
	return &tls.Config{RootCAs: ca.pool, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
}
