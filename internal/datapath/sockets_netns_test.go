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

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus/hooks/test"
)

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func reserve(tb testing.TB, k *Kernel, r PortRequest) uint16 {
	tb.Helper()
	port, err := k.Reserve(tb.Context(), r)
	if err != nil {
		tb.Fatalf("reserve %+v: %v", r, err)
	}
	return port
}

// free says whether another program could take the port now.
func free(tb testing.TB, network, addr string) bool {
	tb.Helper()
	var c io.Closer
	var err error
	if strings.HasPrefix(network, "tcp") {
		c, err = net.Listen(network, addr)
	} else {
		c, err = net.ListenPacket(network, addr)
	}
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

func socketsOf(p Proto, port uint16, to string, hosts ...string) State {
	var s State
	for _, h := range hosts {
		s.Sockets = append(s.Sockets, Socket{Proto: p, Host: netip.AddrPortFrom(netip.MustParseAddr(h), port), To: addrPort(to)})
	}
	return s
}

func TestReserve(t *testing.T) {
	for _, c := range []struct {
		proto Proto
		net   string
	}{{TCP, "tcp"}, {UDP, "udp"}} {
		t.Run(c.net, func(t *testing.T) {
			k, _ := newKernel(t)
			both := addrs("0.0.0.0", "::")
			if got := reserve(t, k, PortRequest{Proto: c.proto, Hosts: both, First: 8080, Last: 8080}); got != 8080 {
				t.Errorf("port %d", got)
			}
			if free(t, c.net+"4", "127.0.0.1:8080") || free(t, c.net+"6", "[::1]:8080") {
				t.Error("the port is not held in both families")
			}
			same(t, k, State{}) // nobody may take it for a leak
			if got := reserve(t, k, PortRequest{Proto: c.proto, Hosts: both, First: 8080, Last: 8080}); got != 8080 {
				t.Errorf("again: port %d", got)
			}
			if got := reserve(t, k, PortRequest{Proto: c.proto, Hosts: both, First: 8080, Last: 8082}); got != 8081 {
				t.Errorf("first free of a range: %d", got)
			}
			s := socketsOf(c.proto, 8080, "10.7.0.2:80", "0.0.0.0", "::")
			ensure(t, k, s)
			same(t, k, s)
			_, err := k.Reserve(t.Context(), PortRequest{Proto: c.proto, Hosts: both, First: 8080, Last: 8080})
			wantError(t, err, "8080/"+c.net, "0.0.0.0", "published for 10.7.0.2:80: stop that container, or choose another host port")
			_, err = k.Reserve(t.Context(), PortRequest{Proto: c.proto, Hosts: addrs("127.0.0.1"), First: 8080, Last: 8080})
			wantError(t, err, "127.0.0.1", "published for 10.7.0.2:80")
			_, err = k.Ensure(t.Context(), socketsOf(c.proto, 8080, "10.7.0.3:80", "0.0.0.0", "::"))
			wantError(t, err, "published for 10.7.0.2:80")
			remove(t, k, socketsOf(c.proto, 8080, "10.7.0.3:80", "0.0.0.0", "::"))
			same(t, k, s) // what is another container's is not ours to let go
			remove(t, k, s)
			remove(t, k, socketsOf(c.proto, 8081, "10.7.0.2:80", "0.0.0.0", "::"))
			for _, p := range []string{"8080", "8081"} {
				if !free(t, c.net+"4", "0.0.0.0:"+p) || !free(t, c.net+"6", "[::]:"+p) {
					t.Errorf("port %s is still held", p)
				}
			}
		})
	}
}

func TestReserveTakenByAnotherProgram(t *testing.T) {
	for _, c := range []struct {
		proto     Proto
		net, addr string
		hosts     []netip.Addr
		words     []string
	}{
		{TCP, "tcp4", "0.0.0.0:8080", addrs("0.0.0.0"), []string{"port 8080/tcp on 0.0.0.0 is in use by another program"}},
		{TCP, "tcp4", "127.0.0.1:8080", addrs("0.0.0.0"), []string{"port 8080/tcp on 0.0.0.0 is in use by another program"}},
		{TCP, "tcp6", "[::1]:8080", addrs("0.0.0.0", "::"), []string{"port 8080/tcp on :: is in use by another program"}},
		{UDP, "udp4", "127.0.0.1:8080", addrs("0.0.0.0", "::"), []string{"port 8080/udp on 0.0.0.0 is in use by another program"}},
		{UDP, "udp6", "[::]:8080", addrs("0.0.0.0", "::"), []string{"port 8080/udp on :: is in use by another program"}},
		{TCP, "tcp4", "127.0.0.1:1", addrs("0.0.0.0", "192.0.2.77"), []string{"8080/tcp on 192.0.2.77", "no such address"}},
	} {
		t.Run(c.net+" "+c.addr, func(t *testing.T) {
			k, _ := newKernel(t)
			var other io.Closer
			var err error
			if c.proto == TCP {
				other, err = net.Listen(c.net, c.addr)
			} else {
				other, err = net.ListenPacket(c.net, c.addr)
			}
			if err != nil {
				t.Fatal(err)
			}
			_, err = k.Reserve(t.Context(), PortRequest{Proto: c.proto, Hosts: c.hosts, First: 8080, Last: 8080})
			wantError(t, err, c.words...)
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
			if !free(t, c.proto.String()+"4", "0.0.0.0:8080") || !free(t, c.proto.String()+"6", "[::]:8080") {
				t.Error("something that the failed call bound is still bound")
			}
		})
	}
}

func TestReserveRangesAndChoice(t *testing.T) {
	k, _ := newKernel(t)
	closeLater(t)(net.Listen("tcp6", "[::]:9000"))
	both := addrs("0.0.0.0", "::", "0.0.0.0")
	if got := reserve(t, k, PortRequest{Proto: TCP, Hosts: both, First: 9000, Last: 9002}); got != 9001 {
		t.Errorf("port %d; 9000 is taken in one family only, and so of no use", got)
	}
	if got := reserve(t, k, PortRequest{Proto: TCP, Hosts: both, First: 9000, Last: 9002}); got != 9002 {
		t.Errorf("port %d", got)
	}
	_, err := k.Reserve(t.Context(), PortRequest{Proto: TCP, Hosts: both, First: 9000, Last: 9002})
	wantError(t, err, "9000-9002/tcp", "0.0.0.0, ::")
	seen := map[uint16]bool{}
	for range 50 {
		port := reserve(t, k, PortRequest{Proto: UDP, Hosts: both, First: 0, Last: 0})
		if port == 0 || seen[port] {
			t.Errorf("kernel's choice %d, seen before: %t", port, seen[port])
		}
		seen[port] = true
		if free(t, "udp6", fmt.Sprintf("[::]:%d", port)) {
			t.Errorf("port %d is not held for IPv6", port)
		}
	}
	for _, bad := range []PortRequest{
		{Proto: TCP, Hosts: nil, First: 80, Last: 80}, {Proto: Proto(1), Hosts: both, First: 80, Last: 80}, {Proto: TCP, Hosts: both, First: 90, Last: 80}, {Proto: TCP, Hosts: both, First: 0, Last: 80}, {Proto: TCP, Hosts: []netip.Addr{{}}, First: 80, Last: 80},
	} {
		if _, err := k.Reserve(t.Context(), bad); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
	_, err = k.Reserve(newCountdown(t, 0), PortRequest{Proto: TCP, Hosts: both, First: 100, Last: 200})
	wantError(t, err, "canceled")
}

// Where the kernel has no SCTP sockets ports are published without a hold.
func TestReserveSCTP(t *testing.T) {
	k, _ := newKernel(t)
	log, records := test.NewNullLogger()
	k.sockets.log = log
	has := true
	if c, err := bindSCTP(addrPort("127.0.0.1:0")); err == nil {
		_ = c.Close()
	} else {
		has = false
	}
	hosts := addrs("0.0.0.0", "::")
	reserve(t, k, PortRequest{Proto: SCTP, Hosts: hosts, First: 7000, Last: 7000})
	chosen := reserve(t, k, PortRequest{Proto: SCTP, Hosts: hosts, First: 0, Last: 0})
	if chosen == 0 {
		t.Error("no port was chosen")
	}
	s := socketsOf(SCTP, 7000, "10.7.0.2:70", "0.0.0.0", "::")
	ensure(t, k, s)
	same(t, k, s)
	_, err := k.Reserve(t.Context(), PortRequest{Proto: SCTP, Hosts: addrs("127.0.0.1"), First: 7000, Last: 7000})
	wantError(t, err, "7000/sctp", "published for 10.7.0.2:70")
	warnings := 0
	for _, e := range records.AllEntries() {
		if e.Level.String() == "warning" {
			warnings++
		}
	}
	if want := map[bool]int{true: 0, false: 1}[has]; warnings != want {
		t.Errorf("%d warnings, want %d (kernel has SCTP: %t)", warnings, want, has)
	}
	remove(t, k, s)
	same(t, k, State{})
	if !has {
		t.Skip("needs SCTP sockets, which this kernel lacks, for the rest: that a held port is refused to others")
	}
	reserve(t, k, PortRequest{Proto: SCTP, Hosts: hosts, First: 7001, Last: 7001})
	if c, err := bindSCTP(addrPort("127.0.0.1:7001")); err == nil {
		_ = c.Close()
		t.Error("a held SCTP port was given to another")
	}
}

// goroutines waits until there are at most n, and fails with all their stacks
// if that does not happen.
func goroutines(tb testing.TB, n int) {
	tb.Helper()
	for range 200 {
		if runtime.NumGoroutine() <= n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	buf := make([]byte, 1<<20)
	tb.Errorf("%d goroutines, want %d:\n%s", runtime.NumGoroutine(), n, buf[:runtime.Stack(buf, true)])
}

// What 1000 held ports of each protocol cost, and that they end.
func TestThousandHeldPorts(t *testing.T) {
	k, _ := newKernel(t)
	var s State
	for i := range uint16(1000) {
		s.Add(socketsOf(TCP, 10000+i, "10.7.0.2:80", "0.0.0.0"))
		s.Add(socketsOf(UDP, 10000+i, "10.7.0.2:80", "0.0.0.0"))
	}
	runtime.GC()
	var before, after runtime.MemStats
	n := runtime.NumGoroutine()
	runtime.ReadMemStats(&before)
	start := time.Now()
	ensure(t, k, s)
	took := time.Since(start)
	runtime.GC()
	runtime.ReadMemStats(&after)
	heap := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / 2000
	stack := (int64(after.StackInuse) - int64(before.StackInuse)) / 2000
	t.Logf("a held port costs %d bytes of heap and %d of stacks; 2000 took %s", heap, stack, took)
	if heap+stack > 16<<10 {
		t.Errorf("a held port costs %d bytes", heap+stack)
	}
	got := owned(t, k).Sockets
	if d := cmp.Diff(s.Sockets, got, cmpopts.EquateComparable(Socket{}), cmpopts.SortSlices(func(a, b Socket) bool { return a.String() < b.String() })); d != "" {
		t.Errorf("sockets (-want +got):\n%s", d)
	}
	remove(t, k, State{Sockets: s.Sockets[:1000]})
	k.sockets.close() // as at the end of the process
	goroutines(t, n)
	if !free(t, "tcp4", "0.0.0.0:10999") || !free(t, "udp4", "0.0.0.0:10000") {
		t.Error("ports are still held")
	}
}
