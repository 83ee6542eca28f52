package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/internal/netnstest"
)

const patience = 5 * time.Second

// proxied is a host with one container that has only IPv4, and a port
// published on all IPv6 addresses of the host.
func proxied(t *testing.T, proto Proto) (k *Kernel, container *netnstest.NS) {
	t.Helper()
	k, _ = newKernel(t)
	s := network()
	s.Elements, s.Sockets = nil, nil
	s.Add(socketsOf(proto, 8080, "10.7.0.2:80", "::"))
	ensure(t, k, s)
	container = netnstest.New(t)
	container.Take("wfap", "eth0", prefix("10.7.0.2/24"))
	container.Gateway(netip.MustParseAddr("10.7.0.1"))
	reachable(t, "10.7.0.2")
	return k, container
}

// reachable waits for a container whose link was just set up: the kernel
// tells the bridge of the carrier up to a second later, and until then drops
// frames.
func reachable(t *testing.T, addr string) {
	t.Helper()
	for range 50 {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, "1"), 100*time.Millisecond)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s cannot be reached", addr)
}

// serveTCP runs f for each connection to the container's port 80.
func serveTCP(t *testing.T, container *netnstest.NS, f func(*net.TCPConn)) {
	t.Helper()
	var l net.Listener
	container.Do(func() {
		var err error
		if l, err = net.Listen("tcp4", "10.7.0.2:80"); err != nil {
			t.Fatal(err)
		}
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(patience))
				f(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
}

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func TestProxyTCPHalfClose(t *testing.T) {
	_, container := proxied(t, TCP)
	// Answers only when the question has ended.
	serveTCP(t, container, func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		if err != nil {
			t.Errorf("container: %v", err)
		}
		_, _ = c.Write(bytes.ToUpper(b))
	})
	big := bytes.Repeat([]byte("weft"), 1<<20)
	for _, addr := range []string{"[::1]:8080", "[fd07::1]:8080"} {
		c := dialTCP(t, addr)
		if _, err := c.Write(big); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, bytes.ToUpper(big)) {
			t.Errorf("via %s: %d bytes back, %v, want %d", addr, len(got), err, len(big))
		}
	}
}

// The container speaks first and closes its half first.
func TestProxyTCPServerEndsFirst(t *testing.T) {
	_, container := proxied(t, TCP)
	rest := make(chan string, 1)
	serveTCP(t, container, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("hello"))
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		rest <- string(b)
	})
	c := dialTCP(t, "[::1]:8080")
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		t.Errorf("read %q, %v", b, err)
	}
	_, _ = c.Write([]byte("bye"))
	_ = c.CloseWrite()
	select {
	case got := <-rest:
		if got != "bye" {
			t.Errorf("container read %q after closing its half", got)
		}
	case <-time.After(patience):
		t.Error("the container's half never ended")
	}
}

// A reset is not passed on as an orderly end, in either direction.
func TestProxyTCPReset(t *testing.T) {
	_, container := proxied(t, TCP)
	seen := make(chan error, 1)
	serveTCP(t, container, func(c *net.TCPConn) {
		b := make([]byte, 1)
		_, _ = c.Read(b)
		if b[0] == 'r' {
			reset(c)
			return
		}
		_, err := c.Read(b)
		seen <- err
	})
	c := dialTCP(t, "[::1]:8080")
	_, _ = c.Write([]byte("r"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	c = dialTCP(t, "[::1]:8080")
	_, _ = c.Write([]byte("x"))
	time.Sleep(100 * time.Millisecond) // for x to arrive: a reset overtakes data
	reset(c)
	select {
	case err := <-seen:
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the container saw %v, want a reset", err)
		}
	case <-time.After(patience):
		t.Error("the container never saw the reset")
	}
}

func TestProxyTCPNothingListens(t *testing.T) {
	proxied(t, TCP)
	// The reset may be there before the client's connect has returned.
	c, err := net.DialTimeout("tcp", "[::1]:8080", patience)
	if err == nil {
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
}

// Letting go of a port ends its connections and all goroutines.
func TestProxyTCPCloseEndsEverything(t *testing.T) {
	k, container := proxied(t, TCP)
	serveTCP(t, container, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
	n := runtime.NumGoroutine()
	conns := make([]*net.TCPConn, 20)
	for i := range conns {
		conns[i] = dialTCP(t, "[::1]:8080")
		_, _ = conns[i].Write([]byte("x"))
		if _, err := io.ReadFull(conns[i], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if runtime.NumGoroutine() <= n {
		t.Error("no goroutines to end: this test shows nothing")
	}
	remove(t, k, socketsOf(TCP, 8080, "10.7.0.2:80", "::"))
	if _, err := conns[0].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an open connection saw %v, want a reset", err)
	}
	goroutines(t, n-1) // the listener's has ended too
}

// Closing does not wait for a container that does not answer the dial.
func TestProxyTCPCloseWhileDialling(t *testing.T) {
	k, _ := newKernel(t)
	dialling := make(chan struct{})
	k.sockets.proxy.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		close(dialling)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	ensure(t, k, socketsOf(TCP, 8080, "10.7.0.2:80", "::"))
	dialTCP(t, "[::1]:8080")
	<-dialling
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.sockets.close()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("close hangs on a dial")
	}
}

// serveUDP echoes, with the sender's address in front, on the container's port
// 80; froms counts the different senders that it sees.
func serveUDP(t *testing.T, container *netnstest.NS) (froms func() int) {
	t.Helper()
	var c net.PacketConn
	container.Do(func() {
		var err error
		if c, err = net.ListenPacket("udp4", "10.7.0.2:80"); err != nil {
			t.Fatal(err)
		}
	})
	var mu sync.Mutex
	seen := map[string]bool{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			mu.Lock()
			seen[from.String()] = true
			mu.Unlock()
			_, _ = c.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		_ = c.Close()
		<-done
	})
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(seen)
	}
}

// ask sends a datagram and returns the answer to it.
func ask(c net.Conn, question []byte) ([]byte, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if _, err := c.Write(question); err != nil {
		return nil, err
	}
	buf := make([]byte, maxDatagram)
	n, err := c.Read(buf)
	return buf[:n], err
}

func dialUDP(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestProxyUDP(t *testing.T) {
	k, container := proxied(t, UDP)
	froms := serveUDP(t, container)
	n := runtime.NumGoroutine()
	const clients = 10
	for i := range clients {
		// A connected socket takes answers only from the address it asked;
		// the host has more than one.
		addr := []string{"[::1]:8080", "[fd07::1]:8080"}[i%2]
		c := dialUDP(t, addr)
		for _, size := range []int{0, 1, 1400, 60000} {
			q := bytes.Repeat([]byte{byte(i)}, size)
			if a, err := ask(c, q); err != nil || !bytes.Equal(a, q) {
				t.Fatalf("client %d via %s, %d bytes: %d back, %v", i, addr, size, len(a), err)
			}
		}
	}
	if got := froms(); got != clients {
		t.Errorf("the container saw %d clients, want %d", got, clients)
	}
	if got := runtime.NumGoroutine() - n; got != clients {
		t.Errorf("%d goroutines for %d clients", got, clients)
	}
	remove(t, k, socketsOf(UDP, 8080, "10.7.0.2:80", "::"))
	goroutines(t, n-1)
}

// The answer comes from the address that was asked, also where the kernel
// would choose another one of the host's.
func TestProxyUDPAnswersFromTheAddressAsked(t *testing.T) {
	k, container := proxied(t, UDP)
	serveUDP(t, container)
	ensure(t, k, socketsOf(UDP, 8080, "10.7.0.2:80", "0.0.0.0"))
	v := netlink.NewVeth(netlink.NewLinkAttrs())
	v.Name, v.PeerName, v.Flags = "lan", "lan2", net.FlagUp
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"192.0.2.1/24", "192.0.2.5/24", "fd99::1/64", "fd99::5/64"} {
		if err := k.links.addAddress(v.Index, prefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	client := netnstest.New(t)
	client.Take("lan2", "eth0", prefix("192.0.2.9/24"), prefix("fd99::9/64"))
	for _, addr := range []string{"192.0.2.1:8080", "192.0.2.5:8080", "[fd99::1]:8080", "[fd99::5]:8080"} {
		client.Do(func() {
			reachable(t, addrPort(addr).Addr().String())
			if a, err := ask(dialUDP(t, addr), []byte("x")); err != nil || string(a) != "x" {
				t.Errorf("%s answers %q, %v", addr, a, err)
			}
		})
	}
}

func TestProxyUDPIdleSessionsEnd(t *testing.T) {
	k, container := proxied(t, UDP)
	remove(t, k, socketsOf(UDP, 8080, "10.7.0.2:80", "::"))
	k.sockets.proxy.idle = 200 * time.Millisecond
	ensure(t, k, socketsOf(UDP, 8080, "10.7.0.2:80", "::"))
	froms := serveUDP(t, container)
	n := runtime.NumGoroutine()
	c := dialUDP(t, "[::1]:8080")
	for range 5 { // together longer than the idle time
		if _, err := ask(c, []byte("x")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(80 * time.Millisecond)
	}
	if got := froms(); got != 1 {
		t.Errorf("%d sessions for a client that keeps asking", got)
	}
	goroutines(t, n)
	if _, err := ask(c, []byte("y")); err != nil {
		t.Errorf("after the idle time: %v", err)
	}
	if got := froms(); got != 2 {
		t.Errorf("%d sessions, want the old one ended and a new one", got)
	}
}

// A closed port in the container, seen as an ICMP error, ends nothing.
func TestProxyUDPContainerComesBack(t *testing.T) {
	_, container := proxied(t, UDP)
	c := dialUDP(t, "[::1]:8080")
	_, _ = c.Write([]byte("lost"))
	time.Sleep(100 * time.Millisecond)
	serveUDP(t, container)
	if a, err := ask(c, []byte("found")); err != nil || string(a) != "found" {
		t.Errorf("answer %q, %v", a, err)
	}
}

func TestProxyUDPLimitsSessions(t *testing.T) {
	k, container := proxied(t, UDP)
	froms := serveUDP(t, container)
	n := runtime.NumGoroutine()
	var failed atomic.Int32
	for i := range maxSessions + 20 {
		c := dialUDP(t, "[::1]:8080")
		if i >= maxSessions {
			_ = c.SetDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = c.Write([]byte("x"))
			if _, err := c.Read(make([]byte, 1)); err != nil {
				failed.Add(1)
			}
			continue
		}
		if _, err := ask(c, []byte("x")); err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
	}
	if froms() != maxSessions || failed.Load() != 20 {
		t.Errorf("%d sessions, %d clients refused", froms(), failed.Load())
	}
	k.sockets.close()
	goroutines(t, n-1)
}

// A datagram that is re-published leads to the new container, even if the
// client has never stopped sending.
func TestUDPFlowsAreForgotten(t *testing.T) {
	k, host := newKernel(t)
	if k.flows.track == nil {
		t.Fatal("needs nf_conntrack_netlink, which every kernel of Debian has")
	}
	s := network()
	s.Elements, s.Sockets = nil, nil
	s.Elements = []Element{{Set: SetBridges, Link: "wfnet"}}
	ensure(t, k, s)
	answers := func(peer, addr string) {
		c := netnstest.New(t)
		c.Take(peer, "eth0", prefix(addr+"/24"))
		c.Gateway(netip.MustParseAddr("10.7.0.1"))
		reachable(t, addr)
		var conn net.PacketConn
		c.Do(func() {
			var err error
			if conn, err = net.ListenPacket("udp4", ":53"); err != nil {
				t.Fatal(err)
			}
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf := make([]byte, 100)
			for {
				_, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = conn.WriteTo([]byte(addr), from)
			}
		}()
		t.Cleanup(func() {
			_ = conn.Close()
			<-done
		})
	}
	answers("wfap", "10.7.0.2")
	answers("wfcp", "10.7.0.3")
	client := netnstest.New(t)
	host.Exec("sh", "-ec", "ip link add lan type veth peer name lan2; ip addr add 192.0.2.1/24 dev lan; ip link set lan up; sysctl -qw net.ipv4.ip_forward=1")
	client.Take("lan2", "eth0", prefix("192.0.2.9/24"))
	var c net.Conn
	client.Do(func() { c = dialUDP(t, "192.0.2.1:53") })
	published := func(to string) State {
		return State{Elements: []Element{{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: UDP, Port: 53, To: netip.MustParseAddr(to), ToPort: 53}}}
	}
	check := func(want string) {
		t.Helper()
		k.flows.walks.Wait()
		if a, err := ask(c, []byte("?")); err != nil || string(a) != want {
			t.Errorf("answer %q, %v, want %q", a, err, want)
		}
	}
	_, _ = c.Write([]byte("before anything is published: the host itself"))
	time.Sleep(50 * time.Millisecond)
	_, _ = c.Read(make([]byte, 1)) // takes the ICMP error off the socket
	ensure(t, k, published("10.7.0.2"))
	check("10.7.0.2")
	tracked := func() bool { return strings.Contains(host.Exec("conntrack", "-L", "-p", "udp"), "10.7.0.2") }
	if !tracked() {
		t.Error("no flow to forget: this test shows nothing")
	}
	remove(t, k, published("10.7.0.2"))
	k.flows.walks.Wait()
	if tracked() {
		t.Error("the flow outlived its port")
	}
	ensure(t, k, published("10.7.0.3"))
	check("10.7.0.3")
	// As after a crash in between: the port leads elsewhere at once.
	track := k.flows.track
	k.flows.track = nil
	remove(t, k, published("10.7.0.3"))
	k.flows.track = track
	ensure(t, k, published("10.7.0.2"))
	check("10.7.0.2")
}

func BenchmarkProxyTCP(b *testing.B) {
	k, _ := newKernel(b)
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = server.Close() })
	go func() {
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(io.Discard, c)
				_, _ = c.Write([]byte("."))
				_ = c.Close()
			}()
		}
	}()
	ensure(b, k, State{Sockets: []Socket{{Proto: TCP, Host: addrPort("[::]:8080"), To: server.Addr().(*net.TCPAddr).AddrPort()}}})
	block := make([]byte, 1<<20)
	send := func(addr string) time.Duration {
		start := time.Now()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		for range 64 {
			if _, err := c.Write(block); err != nil {
				b.Fatal(err)
			}
		}
		_ = c.(*net.TCPConn).CloseWrite()
		if _, err := io.ReadAll(c); err != nil {
			b.Fatal(fmt.Errorf("via %s: %w", addr, err))
		}
		_ = c.Close()
		return time.Since(start)
	}
	var direct, through time.Duration
	for b.Loop() {
		direct += send(server.Addr().String())
		through += send("[::1]:8080")
	}
	b.ReportMetric(float64(through)/float64(direct), "proxied/direct")
}
