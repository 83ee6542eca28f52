package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/internal/netnstest"
)

// What is on the LAN of the tests: the host's lan0, and a station.
var (
	hostCard    = mac(1)
	stationCard = mac(2)
	occupied    = []netip.Addr{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd09::2")}
	vacant      = []netip.Addr{netip.MustParseAddr("10.9.0.99"), netip.MustParseAddr("fd09::99")}
)

// newLAN is a host with a card lan0, and a station at the other end of the
// cable with two addresses and as many more as are given.
func newLAN(t *testing.T, more ...netip.Prefix) (k *Kernel, host, station *netnstest.NS) {
	t.Helper()
	k, host = newKernel(t)
	station = netnstest.New(t)
	host.Exec("ip", "link", "add", "lan0", "address", hostCard.String(), "type", "veth", "peer", "name", "lan1", "address", stationCard.String())
	host.Exec("ip", "link", "set", "lan0", "up")
	station.Take("lan1", "eth0", append(more, prefix("10.9.0.2/24"), prefix("fd09::2/64"))...)
	awaitCarrier(t, k, "lan0", true)
	return k, host, station
}

func awaitCarrier(t *testing.T, k *Kernel, link string, want bool) {
	t.Helper()
	for range 300 {
		up, err := k.links.connected(link)
		if err != nil {
			t.Fatal(err)
		}
		if up == want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: carrier is not %t", link, want)
}

func wantHolder(t *testing.T, k *Kernel, link string, a netip.Addr, want MAC) {
	t.Helper()
	start := time.Now()
	got, taken, err := k.Probe(t.Context(), link, a)
	if err != nil || !taken || got != want {
		t.Errorf("probe %s on %s: holder %q, taken %t, %v; want %s", a, link, got, taken, err, want)
	}
	if d := time.Since(start); d > probeTimes*probeInterval {
		t.Errorf("probe %s on %s: the answer took %s", a, link, d)
	}
}

func wantFree(t *testing.T, k *Kernel, link string, a netip.Addr) {
	t.Helper()
	if got, taken, err := k.Probe(t.Context(), link, a); err != nil || taken || got != (MAC{}) {
		t.Errorf("probe %s on %s: holder %q, taken %t, %v; want it free", a, link, got, taken, err)
	}
}

// wantSilence expects the answer "free" without a question.
func wantSilence(t *testing.T, k *Kernel, link string, a netip.Addr) {
	t.Helper()
	start := time.Now()
	wantFree(t, k, link, a)
	if d := time.Since(start); d >= 2*probeInterval {
		t.Errorf("probe %s on %s waited %s for nobody", a, link, d)
	}
}

// indexIn is the number of a link in another namespace.
func indexIn(t *testing.T, ns *netnstest.NS, link string) int {
	t.Helper()
	var i *net.Interface
	var err error
	ns.Do(func() { i, err = net.InterfaceByName(link) })
	if err != nil {
		t.Fatal(err)
	}
	return i.Index
}

// hear opens a socket in a station that hears who claims a.
func hear(t *testing.T, station *netnstest.NS, a netip.Addr) (q *asker) {
	t.Helper()
	index := indexIn(t, station, "eth0")
	var err error
	station.Do(func() { q, err = newAsker(index, a) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.file.Close() })
	return q
}

func ether(dst, src MAC, proto uint16, payload []byte) []byte {
	b := append(append(dst[:], src[:]...), byte(proto>>8), byte(proto))
	return append(b, payload...)
}

// arpPacket is one that the package itself never sends.
func arpPacket(op byte, sender MAC, from, to string) []byte {
	b := arpProbe(sender, netip.MustParseAddr(to))
	b[7] = op
	copy(b[14:], netip.MustParseAddr(from).AsSlice())
	return b
}

// advert is an advertisement to all nodes.
func advert(target string) []byte {
	b := solicitation(netip.MustParseAddr(target))
	copy(b[8:], netip.MustParseAddr(target).AsSlice())
	copy(b[24:], netip.MustParseAddr("ff02::1").AsSlice())
	b[40], b[42], b[43] = typeAdvert, 0, 0
	sum := checksum(b)
	b[42], b[43] = byte(sum>>8), byte(sum)
	return b
}

// shout sends frames from a station again and again, until stop or the end of
// the test.
func shout(t *testing.T, station *netnstest.NS, frames ...[]byte) (stop func()) {
	t.Helper()
	to := &unix.SockaddrLinklayer{Ifindex: indexIn(t, station, "eth0")}
	fd, err := -1, error(nil)
	station.Do(func() { fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			for _, f := range frames {
				if err := unix.Sendto(fd, f, 0, to); err != nil {
					t.Errorf("send %x: %v", f, err)
				}
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		_ = unix.Close(fd)
	})
	t.Cleanup(stop)
	return stop
}

func TestProbeFindsHolder(t *testing.T) {
	k, _, station := newLAN(t)
	for _, a := range occupied {
		wantHolder(t, k, "lan0", a, stationCard)
	}
	wantHolder(t, k, "lan0", netip.MustParseAddr("::ffff:10.9.0.2"), stationCard)
	wantHolder(t, k, "lan0", netip.MustParseAddr("fd09::2%lan0"), stationCard)
	station.Exec("ip", "addr", "add", "fe80::77/64", "dev", "eth0", "nodad")
	wantHolder(t, k, "lan0", netip.MustParseAddr("fe80::77"), stationCard)
}

// A free address costs three questions and less than half a second.
func TestProbeFreeAddress(t *testing.T) {
	k, _, station := newLAN(t)
	for _, a := range vacant {
		fastest := time.Hour
		for range 3 { // a machine with other work may be late now and then
			others := hear(t, station, a)
			start := time.Now()
			wantFree(t, k, "lan0", a)
			fastest = min(fastest, time.Since(start))
			if err := others.file.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			n := 0
			for from, err := others.listen(); err == nil; from, err = others.listen() {
				if n++; from != hostCard {
					t.Errorf("probe %s: question from %s", a, from)
				}
			}
			if n != probeTimes {
				t.Errorf("probe %s: %d questions, want %d", a, n, probeTimes)
			}
		}
		if fastest < probeTimes*probeInterval || fastest > 500*time.Millisecond {
			t.Errorf("probe %s: %s for a free address", a, fastest)
		}
	}
}

// The host's own addresses are taken, wherever they are and even if the link
// is down.
func TestProbeOwnAddress(t *testing.T) {
	k, host, _ := newLAN(t)
	host.Exec("sh", "-ec", `ip addr add 10.9.0.1/24 dev lan0; ip addr add fd09::1/64 dev lan0; ip addr add fe80::1/64 dev lan0
		ip link add other0 address 02:42:00:00:00:07 type veth peer name other1; ip addr add 10.9.0.8/32 dev other0; ip addr add 10.9.0.9/32 dev lo`)
	for a, want := range map[string]MAC{
		"10.9.0.1": hostCard, "fd09::1": hostCard, "fe80::1": hostCard, "10.9.0.8": mac(7), "10.9.0.9": {}, "127.0.0.1": {},
	} {
		wantHolder(t, k, "lan0", netip.MustParseAddr(a), want)
	}
	host.Exec("ip", "link", "set", "lan0", "down")
	wantHolder(t, k, "lan0", netip.MustParseAddr("10.9.0.1"), hostCard)
	wantSilence(t, k, "lan0", occupied[0])
}

func TestProbeWhereNobodyCanAnswer(t *testing.T) {
	k, host, station := newLAN(t)
	// A bridge that never had a port says that it has a carrier.
	host.Exec("sh", "-ec", "ip link add br0 type bridge; ip link set br0 up; ip link add port0 type veth peer name port1; ip link set port0 master br0 up")
	awaitCarrier(t, k, "br0", false)
	for _, a := range occupied {
		wantSilence(t, k, "lo", a)
		wantSilence(t, k, "br0", a)

		host.Exec("ip", "link", "set", "lan0", "arp", "off")
		wantSilence(t, k, "lan0", a)
		host.Exec("ip", "link", "set", "lan0", "arp", "on")
		wantHolder(t, k, "lan0", a, stationCard)

		station.Exec("ip", "link", "set", "eth0", "down")
		awaitCarrier(t, k, "lan0", false)
		wantSilence(t, k, "lan0", a)
		station.Exec("sh", "-ec", "ip link set eth0 up; ip addr replace fd09::2/64 dev eth0 nodad")
		awaitCarrier(t, k, "lan0", true)
		wantHolder(t, k, "lan0", a, stationCard)

		host.Exec("ip", "link", "set", "lan0", "down")
		wantSilence(t, k, "lan0", a)
		host.Exec("ip", "link", "set", "lan0", "up")
		awaitCarrier(t, k, "lan0", true)
	}
}

// A link that goes down under a probe leads to nobody, too.
func TestProbeLinkGoesDown(t *testing.T) {
	k, host, station := newLAN(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, a := range vacant {
		others := hear(t, station, a)
		wg.Go(func() {
			if _, err := others.listen(); err != nil { // the first question
				t.Error(err)
			}
			host.Exec("ip", "link", "set", "lan0", "down")
		})
		start := time.Now()
		wantFree(t, k, "lan0", a)
		if d := time.Since(start); d >= probeTimes*probeInterval {
			t.Errorf("probe %s waited %s, after the link was down", a, d)
		}
		wg.Wait()
		host.Exec("ip", "link", "set", "lan0", "up")
		awaitCarrier(t, k, "lan0", true)
	}
}

// A queue that is full loses questions like a wire does.
func TestProbeFullQueue(t *testing.T) {
	k, host, _ := newLAN(t)
	if out, err := host.Output("tc", "qdisc", "add", "dev", "lan0", "root", "pfifo", "limit", "0"); err != nil {
		t.Skipf("needs a queue of no length (tc, pfifo): %s", out)
	}
	for _, a := range occupied {
		wantFree(t, k, "lan0", a)
	}
	host.Exec("tc", "qdisc", "del", "dev", "lan0", "root")
	for _, a := range occupied {
		wantHolder(t, k, "lan0", a, stationCard)
	}
}

func TestProbeErrors(t *testing.T) {
	k, _, _ := newLAN(t)
	_, _, err := k.Probe(t.Context(), "nope0", occupied[0])
	wantError(t, err, "probe 10.9.0.2 on nope0", "does not exist")
	_, _, err = k.Probe(t.Context(), "longer-than-sixteen", occupied[0])
	wantError(t, err, "longer-than-sixteen")
	_, _, err = k.Probe(t.Context(), "lan0", netip.Addr{})
	wantError(t, err, "lan0", "not an address")
}

func TestProbeGivesUpWithItsContext(t *testing.T) {
	k, _, _ := newLAN(t)
	for _, a := range vacant {
		fastest := time.Hour
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, taken, err := k.Probe(ctx, "lan0", a)
			if !errors.Is(err, context.DeadlineExceeded) || taken {
				t.Errorf("probe %s: taken %t, %v; want a deadline", a, taken, err)
			}
			fastest = min(fastest, time.Since(start))
			if _, _, err := k.Probe(ctx, "lan0", a); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("probe %s with a dead context: %v", a, err)
			}
		}
		if fastest >= probeInterval {
			t.Errorf("probe %s: gave up after %s", a, fastest)
		}
	}
}

func TestProbeThroughBridge(t *testing.T) {
	k, host, _ := newLAN(t)
	host.Exec("sh", "-ec", "ip link add br0 address 02:42:00:00:00:09 type bridge; ip link set br0 up; ip link set lan0 master br0; ip addr add 10.9.0.1/24 dev br0")
	awaitCarrier(t, k, "br0", true)
	for i, a := range occupied {
		wantHolder(t, k, "br0", a, stationCard)
		wantFree(t, k, "br0", vacant[i])
	}
	wantHolder(t, k, "br0", netip.MustParseAddr("10.9.0.1"), mac(9))
}

// Links above the parent take frames that arrive for it out of its hands; the
// answers must not be among them.
func TestProbeOnParent(t *testing.T) {
	for _, kind := range []string{"macvlan mode bridge", "macvlan mode private", "ipvlan mode l2"} {
		t.Run(kind, func(t *testing.T) {
			k, host, _ := newLAN(t)
			add := strings.Fields("link add child0 link lan0 type " + kind)
			if out, err := host.Output("ip", add...); err != nil {
				t.Skipf("needs links of kind %s, which this kernel lacks: %s", kind, out)
			}
			host.Exec("sh", "-ec", "ip link set child0 up; ip addr add 10.9.0.50/24 dev child0; ip addr add fd09::50/64 dev child0 nodad")
			child, err := k.links.change.get("child0")
			if err != nil {
				t.Fatal(err)
			}
			for i, a := range occupied {
				wantHolder(t, k, "lan0", a, stationCard)
				wantFree(t, k, "lan0", vacant[i])
			}
			wantHolder(t, k, "lan0", netip.MustParseAddr("10.9.0.50"), child.mac)
			wantHolder(t, k, "lan0", netip.MustParseAddr("fd09::50"), child.mac)
		})
	}
}

// Whoever asks for the address at the same moment is going to take it.
func TestProbeSimultaneous(t *testing.T) {
	k, _, station := newLAN(t)
	stop := shout(t, station,
		ether(MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, stationCard, unix.ETH_P_ARP, arpProbe(stationCard, vacant[0])),
		ether(MAC{0x33, 0x33, 0xff, 0, 0, 0x99}, stationCard, unix.ETH_P_IPV6, solicitation(vacant[1])))
	for _, a := range vacant {
		wantHolder(t, k, "lan0", a, stationCard)
	}
	stop()
	// Two of us: both may lose, both must not win.
	var there *Kernel
	var err error
	station.Do(func() { there, err = New(Config{Log: discard()}) })
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	for _, a := range vacant {
		var wg sync.WaitGroup
		var from MAC
		var lost bool
		wg.Go(func() {
			station.Do(func() { from, lost, err = there.Probe(t.Context(), "eth0", a) })
		})
		holder, taken, e := k.Probe(t.Context(), "lan0", a)
		wg.Wait()
		if err != nil || e != nil {
			t.Fatalf("probe %s: %v, %v", a, e, err)
		}
		if !taken && !lost || taken && holder != stationCard || lost && from != hostCard {
			t.Errorf("probe %s: the host found %q (%t), the station %q (%t)", a, holder, taken, from, lost)
		}
	}
}

// None of these says that the addresses are taken.
func TestProbeIgnores(t *testing.T) {
	k, _, station := newLAN(t)
	all, nodes, group := MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, MAC{0x33, 0x33, 0, 0, 0, 1}, MAC{0x33, 0x33, 0xff, 0, 0, 0x99}
	truth := arpPacket(arpReply, stationCard, "10.9.0.99", "0.0.0.0")
	forwarded := advert("fd09::99")
	forwarded[7] = 64
	tag := func(proto uint16, b []byte) []byte { return append([]byte{0, 7, byte(proto >> 8), byte(proto)}, b...) }
	for name, frames := range map[string][2][]byte{
		"answers for others": {
			ether(hostCard, stationCard, unix.ETH_P_ARP, arpPacket(arpReply, stationCard, "10.9.0.98", "10.9.0.99")),
			ether(nodes, stationCard, unix.ETH_P_IPV6, advert("fd09::98")),
		},
		"our own questions": {
			ether(all, hostCard, unix.ETH_P_ARP, arpProbe(hostCard, vacant[0])),
			ether(group, hostCard, unix.ETH_P_IPV6, solicitation(vacant[1])),
		},
		"our own question, repeated by another": {
			ether(all, stationCard, unix.ETH_P_ARP, arpProbe(hostCard, vacant[0])),
			ether(nodes, hostCard, unix.ETH_P_IPV6, advert("fd09::99")),
		},
		"answers to others": {
			ether(mac(77), stationCard, unix.ETH_P_ARP, truth),
			ether(mac(77), stationCard, unix.ETH_P_IPV6, advert("fd09::99")),
		},
		"answers of another VLAN": {
			ether(hostCard, stationCard, unix.ETH_P_8021Q, tag(unix.ETH_P_ARP, truth)),
			ether(nodes, stationCard, unix.ETH_P_8021Q, tag(unix.ETH_P_IPV6, advert("fd09::99"))),
		},
		"truncated, forwarded": {
			ether(hostCard, stationCard, unix.ETH_P_ARP, truth[:27]),
			ether(nodes, stationCard, unix.ETH_P_IPV6, forwarded),
		},
	} {
		stop := shout(t, station, frames[:]...)
		for _, a := range vacant {
			if holder, taken, err := k.Probe(t.Context(), "lan0", a); taken || err != nil {
				t.Errorf("%s: probe %s: holder %q, taken %t, %v", name, a, holder, taken, err)
			}
		}
		stop()
	}
	// The same way, what does say so.
	defer shout(t, station, ether(hostCard, stationCard, unix.ETH_P_ARP, truth), ether(nodes, stationCard, unix.ETH_P_IPV6, advert("fd09::99")))()
	for _, a := range vacant {
		wantHolder(t, k, "lan0", a, stationCard)
	}
}

// The IPv6 socket hears neighbour discovery and nothing else of the LAN.
func TestProbeFilter(t *testing.T) {
	_, host, station := newLAN(t)
	echo, udp := advert("fd09::99"), advert("fd09::99")
	echo[40], udp[6] = 128, unix.IPPROTO_UDP
	nodes := MAC{0x33, 0x33, 0, 0, 0, 1}
	q, err := newAsker(indexIn(t, host, "lan0"), vacant[1])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.file.Close() }()
	groups := host.Exec("ip", "maddr", "show", "dev", "lan0")
	for _, g := range []string{"33:33:00:00:00:01 users 2", "33:33:ff:00:00:99"} { // the first is the kernel's too
		if !strings.Contains(groups, g) {
			t.Errorf("the card does not let in %s:\n%s", g, groups)
		}
	}
	shout(t, station, ether(nodes, stationCard, unix.ETH_P_IPV6, echo), ether(nodes, stationCard, unix.ETH_P_IPV6, udp),
		ether(nodes, stationCard, unix.ETH_P_IPV6, advert("fd09::98")))
	if err := q.file.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for seen := 0; seen < 5; {
		var b [200]byte
		n, err := q.file.Read(b[:])
		if err != nil {
			t.Fatal(err)
		}
		m, ok := parseNeighbour(b[:n])
		if !ok {
			t.Fatalf("the socket heard %x", b[:n])
		}
		if m.target.String() == "fd09::98" {
			seen++
		}
	}
}

func TestProbeConcurrently(t *testing.T) {
	var more []netip.Prefix
	for i := range 8 {
		more = append(more, prefix(fmt.Sprintf("10.9.0.%d/24", 100+i)), prefix(fmt.Sprintf("fd09::%d/64", 100+i)))
	}
	k, host, _ := newLAN(t, more...)
	var wg sync.WaitGroup
	probe := func(a netip.Addr, want MAC) {
		wg.Go(func() {
			host.Do(func() {
				if got, taken, err := k.Probe(t.Context(), "lan0", a); err != nil || taken != (want != MAC{}) || got != want {
					t.Errorf("probe %s: holder %q, taken %t, %v; want %q", a, got, taken, err, want)
				}
			})
		})
	}
	start := time.Now()
	for i, p := range more {
		probe(p.Addr(), stationCard)
		free := netip.MustParseAddr(fmt.Sprintf("10.9.0.%d", 200+i))
		if p.Addr().Is6() {
			free = netip.MustParseAddr(fmt.Sprintf("fd09::%d", 200+i))
		}
		probe(free, MAC{})
	}
	wg.Wait()
	if d := time.Since(start); d > 4*probeTimes*probeInterval {
		t.Errorf("%d probes at once took %s", 2*len(more), d)
	}
}

func TestProbeLeavesNothing(t *testing.T) {
	k, host, _ := newLAN(t)
	round := func() {
		for i := range occupied {
			wantHolder(t, k, "lan0", occupied[i], stationCard)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
			_, _, _ = k.Probe(ctx, "lan0", vacant[i])
			cancel()
			_, _, _ = k.Probe(t.Context(), "nope0", occupied[i])
		}
		wantFree(t, k, "lan0", vacant[0])
		host.Exec("ip", "link", "set", "lan0", "arp", "off")
		wantFree(t, k, "lan0", occupied[0])
		host.Exec("ip", "link", "set", "lan0", "arp", "on")
	}
	fds := func() int {
		t.Helper()
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	round()
	runtime.GC() // what earlier tests left to finalisers
	files, routines := fds(), runtime.NumGoroutine()
	for range 4 {
		round()
	}
	goroutines(t, routines)
	if n := fds(); n > files {
		t.Errorf("%d file descriptors, were %d", n, files)
	}
}
