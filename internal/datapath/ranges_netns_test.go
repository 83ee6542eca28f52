package datapath

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
)

// rtp is what Asterisk publishes, on one family: ports 10000 to 20000.
func rtp(host, to string) State {
	h, c := netip.MustParseAddr(host), netip.MustParseAddr(to)
	s := State{Sockets: []Socket{{Proto: UDP, Host: netip.AddrPortFrom(h, 10000), To: netip.AddrPortFrom(c, 10000), More: 10000}}}
	if h.Is4() == c.Is4() {
		s.Elements = []Element{{Set: SetPublished, Net: netip.PrefixFrom(h, 0), Proto: UDP, Port: 10000, More: 10000, To: c}}
	}
	return s
}

// Ten thousand ports are published in well under a second, without a goroutine for
// each, and are free again at once.
func TestTenThousandPorts(t *testing.T) {
	k, _ := newKernel(t)
	n := runtime.NumGoroutine()
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	s := rtp("0.0.0.0", "10.7.0.2")
	start := time.Now()
	if _, err := k.Reserve(t.Context(), PortRequest{Proto: UDP, Hosts: addrs("0.0.0.0"), First: 10000, Last: 10000, More: 10000}); err != nil {
		t.Fatal(err)
	}
	reserved := time.Since(start)
	ensure(t, k, s)
	took := time.Since(start)
	runtime.GC()
	runtime.ReadMemStats(&after)
	heap := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("10001 ports: reserved in %s, published in %s, %d bytes of heap a port", reserved, took, heap/10001)
	if took > 5*time.Second || heap/10001 > 4096 {
		t.Error("too much")
	}
	goroutines(t, n+1)
	same(t, k, s)
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("again: %q", lines)
	}
	for _, p := range []int{10000, 15000, 20000} {
		if free(t, "udp4", fmt.Sprintf("127.0.0.1:%d", p)) {
			t.Errorf("port %d is not held", p)
		}
	}
	_, err := k.Reserve(t.Context(), PortRequest{Proto: UDP, Hosts: addrs("0.0.0.0"), First: 20000, Last: 20000, More: 1})
	wantError(t, err, "20000/udp", "published for 10.7.0.2:20000")
	_, err = k.Reserve(t.Context(), PortRequest{Proto: UDP, Hosts: addrs("0.0.0.0", "::"), First: 30000, Last: 30000, More: 20000})
	wantError(t, err, "ports can be held", "10001 are", "20001 more", "LimitNOFILE")
	start = time.Now()
	remove(t, k, s)
	t.Logf("withdrawn in %s", time.Since(start))
	same(t, k, State{})
	goroutines(t, n)
	if !free(t, "udp4", "0.0.0.0:10000") || !free(t, "udp4", "0.0.0.0:20000") {
		t.Error("ports are still held")
	}
}

// A range on all addresses of both families has one socket for each port, also
// when it is held again after a start; what is left of it has its own.
func TestRangeOnBothFamilies(t *testing.T) {
	for _, proto := range []Proto{UDP, TCP} {
		t.Run(proto.String(), func(t *testing.T) {
			k, _ := newKernel(t)
			const more = 200
			socket := func(host, to string) Socket {
				return Socket{Proto: proto, Host: addrPort(host), To: addrPort(to), More: more}
			}
			v4, v6 := socket("0.0.0.0:10000", "10.7.0.2:20000"), socket("[::]:10000", "[fd07::2]:20000")
			both := State{Sockets: []Socket{v4, v6}}
			wantFree := func(free4, free6 bool) {
				t.Helper()
				for _, p := range []string{"10000", "10100", "10200"} {
					if got := free(t, proto.String()+"4", "0.0.0.0:"+p); got != free4 {
						t.Errorf("port %s is free for IPv4: %t", p, got)
					}
					if got := free(t, proto.String()+"6", "[::]:"+p); got != free6 {
						t.Errorf("port %s is free for IPv6: %t", p, got)
					}
				}
			}
			n, before := runtime.NumGoroutine(), openFiles(t)
			hold := func() {
				t.Helper()
				ensure(t, k, both)
				same(t, k, both)
				if got := openFiles(t) - before; got > more+10 {
					t.Errorf("%d files for %d ports", got, more+1)
				}
				wantFree(false, false)
			}
			for range 2 {
				if _, err := k.Reserve(t.Context(), PortRequest{Proto: proto, Hosts: addrs("0.0.0.0", "::"), First: 10000, Last: 10000, More: more}); err != nil {
					t.Fatal(err)
				}
				wantFree(false, false)
				remove(t, k, both)
				wantFree(true, true)
			}
			hold()
			remove(t, k, State{Sockets: []Socket{v6}})
			wantFree(false, true)
			same(t, k, State{Sockets: []Socket{v4}})
			other := socket("[::]:10000", "10.7.0.2:20000")
			ensure(t, k, State{Sockets: []Socket{other}})
			wantFree(false, false)
			remove(t, k, State{Sockets: []Socket{v4, other}})
			wantFree(true, true)
			hold()
			remove(t, k, State{Sockets: []Socket{v4}})
			same(t, k, State{Sockets: []Socket{v6}})
			again := socket("0.0.0.0:10000", "10.7.0.3:20000")
			ensure(t, k, State{Sockets: []Socket{again}})
			wantFree(false, false)
			same(t, k, State{Sockets: []Socket{v6, again}})
			remove(t, k, State{Sockets: []Socket{again}})
			wantFree(true, false)
			remove(t, k, State{Sockets: []Socket{v6}})
			wantFree(true, true)
			hold()
			remove(t, k, both)
			wantFree(true, true)
			same(t, k, State{})
			goroutines(t, n)
			if got := k.sockets.files.held; got != 0 {
				t.Errorf("%d ports are counted as held", got)
			}
		})
	}
}

// What comes to a socket for both families is passed on and answered by the address
// that was asked, in both.
func TestRangeOnBothFamiliesIsProxied(t *testing.T) {
	for _, proto := range []Proto{UDP, TCP} {
		t.Run(proto.String(), func(t *testing.T) {
			k, container := proxied(t, proto)
			if proto == UDP {
				echoPort(t, container, 20003)
			} else {
				var l net.Listener
				container.Do(func() { l, _ = net.Listen("tcp4", "10.7.0.2:20003") })
				closeLater(t)(l, nil)
				go func() {
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						_, _ = c.Write([]byte("20003"))
						_ = c.Close()
					}
				}()
			}
			ensure(t, k, State{Sockets: []Socket{
				{Proto: proto, Host: addrPort("0.0.0.0:10000"), To: addrPort("10.7.0.2:20000"), More: 5},
				{Proto: proto, Host: addrPort("[::]:10000"), To: addrPort("10.7.0.2:20000"), More: 5},
			}})
			for _, addr := range []string{"127.0.0.1:10003", "[::1]:10003", "10.7.0.1:10003", "[fd07::1]:10003"} {
				var got []byte
				var err error
				if proto == UDP {
					got, err = ask(dialUDP(t, addr), []byte("?"))
				} else {
					got, err = io.ReadAll(dialTCP(t, addr))
				}
				if err != nil || string(got) != "20003" {
					t.Errorf("%s answers %q, %v", addr, got, err)
				}
			}
		})
	}
}

// A range of which one port is taken is taken back whole, and names that port.
func TestRangeTaken(t *testing.T) {
	k, _ := newKernel(t)
	closeLater(t)(net.ListenPacket("udp6", "[::]:10700"))
	_, err := k.Reserve(t.Context(), PortRequest{Proto: UDP, Hosts: addrs("0.0.0.0", "::"), First: 10000, Last: 10000, More: 1000})
	wantError(t, err, "port 10700/udp on :: is in use by another program")
	_, err = k.Ensure(t.Context(), rtp("::", "10.7.0.2"))
	wantError(t, err, "port 10700/udp on :: is in use by another program")
	if !free(t, "udp4", "0.0.0.0:10700") || !free(t, "udp6", "[::]:10000") || !free(t, "udp6", "[::]:10699") {
		t.Error("something is still held")
	}
	same(t, k, State{})
}

// A range is translated as a range, and what cannot be translated is proxied, each
// port to its own; from other hosts and from this one.
func TestRangeReachesTheContainer(t *testing.T) {
	k, host := newKernel(t)
	s := network()
	s.Elements, s.Sockets = []Element{{Set: SetBridges, Link: "wfnet"}}, nil
	s.Add(rtp("0.0.0.0", "10.7.0.2"))
	// TCP, to other numbers: as a driver says it.
	for i := range uint16(3) {
		s.Elements = append(s.Elements, Element{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: TCP, Port: 3000 + i, To: netip.MustParseAddr("10.7.0.2"), ToPort: 4000 + i})
	}
	s.Sockets = append(s.Sockets, Socket{Proto: UDP, Host: addrPort("[::]:10000"), To: addrPort("10.7.0.2:10000"), More: 50},
		Socket{Proto: TCP, Host: addrPort("[::]:3000"), To: addrPort("10.7.0.2:4000"), More: 2})
	ensure(t, k, s)
	container := netnstest.New(t)
	container.Take("wfap", "eth0", prefix("10.7.0.2/24"))
	container.Gateway(netip.MustParseAddr("10.7.0.1"))
	reachable(t, "10.7.0.2")
	for _, p := range []int{10000, 10050, 15000, 20000} {
		echoPort(t, container, p)
	}
	host.Exec("sh", "-ec", "ip link add lan type veth peer name lan2; ip addr add 192.0.2.1/24 dev lan; ip link set lan up; sysctl -qw net.ipv4.ip_forward=1")
	client := netnstest.New(t)
	client.Take("lan2", "eth0", prefix("192.0.2.9/24"))
	check := func(addr, want string) {
		t.Helper()
		if a, err := ask(dialUDP(t, addr), []byte("?")); err != nil || string(a) != want {
			t.Errorf("%s answers %q, %v", addr, a, err)
		}
	}
	for _, p := range []string{"10000", "15000", "20000"} {
		client.Do(func() { check("192.0.2.1:"+p, p) })
		check("192.0.2.1:"+p, p)
	}
	for range 2 {
		check("[::1]:10000", "10000")
		check("[::1]:10050", "10050")
	}
	var l net.Listener
	container.Do(func() { l, _ = net.Listen("tcp4", "10.7.0.2:4001") })
	closeLater(t)(l, nil)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("4001"))
			_ = c.Close()
		}
	}()
	for _, addr := range []string{"192.0.2.1:3001", "[::1]:3001"} {
		b := make([]byte, 4)
		if _, err := dialTCP(t, addr).Read(b); err != nil || string(b) != "4001" {
			t.Errorf("%s answers %q, %v", addr, b, err)
		}
	}
	s.Forward4 = true // by sysctl above
	same(t, k, s)
	if out := host.Exec("nft", "list", "map", "inet", "weft", "published_range4"); !strings.Contains(out, "10000-20000") {
		t.Errorf("nft shows %s", out)
	}
}

// echoPort answers with the number of the port that was asked.
func echoPort(t *testing.T, container *netnstest.NS, port int) {
	t.Helper()
	var conn net.PacketConn
	container.Do(func() {
		var err error
		if conn, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", port)); err != nil {
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
			_, _ = conn.WriteTo([]byte(fmt.Sprint(port)), from)
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
}

// Every kind of element that can be a range is read back as it was written, and
// does not hinder its neighbours.
func TestRangesInEverySet(t *testing.T) {
	k, _ := newKernel(t)
	var s State
	for _, a := range addrs("10.7.0.2", "fd07::2") {
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		host := netip.PrefixFrom(a, a.BitLen())
		for _, proto := range []Proto{TCP, UDP} {
			s.Elements = append(s.Elements,
				Element{Set: SetPublished, Net: all, Proto: proto, Port: 100, More: 10, To: a},
				Element{Set: SetPublished, Net: all, Proto: proto, Port: 111, More: 65535 - 111, To: a},
				Element{Set: SetPublished, Net: all, Proto: proto, Port: 99, To: a, ToPort: 9},
				Element{Set: SetExposed, Net: host, Proto: proto, Port: 100, More: 1},
				Element{Set: SetExposed, Net: host, Proto: proto, Port: 5},
				Element{Set: SetTrusted, Link: "lo", Net: host, Proto: proto, Port: 100, More: 1},
				Element{Set: SetTrusted, Link: "lo2", Net: host, Proto: proto, Port: 100, More: 1},
			)
		}
	}
	ensure(t, k, s)
	same(t, k, s)
	bad := Element{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: UDP, Port: 105, More: 20, To: netip.MustParseAddr("10.7.0.3")}
	_, err := k.Ensure(t.Context(), State{Elements: []Element{bad}})
	wantError(t, err, "105-125", "is there already")
	bad.Port, bad.More = 65000, 600
	_, err = k.Ensure(t.Context(), State{Elements: []Element{bad}})
	wantError(t, err, "too many")
	remove(t, k, s)
	same(t, k, State{})
}
