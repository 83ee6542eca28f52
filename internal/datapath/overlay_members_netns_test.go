package datapath

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
)

// hearer remembers what it hears.
type hearer struct {
	mu    sync.Mutex
	heard map[string]bool
}

func hearken(t *testing.T, ns *netnstest.NS, port int) *hearer {
	t.Helper()
	l := &hearer{heard: map[string]bool{}}
	ns.Do(func() {
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		go func() {
			b := make([]byte, 100)
			for {
				n, _, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				l.mu.Lock()
				l.heard[string(b[:n])] = true
				l.mu.Unlock()
			}
		}()
	})
	return l
}

func (l *hearer) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.heard[text]
}

// waits returns when the text was heard, or says that it was not in time.
func (l *hearer) waits(text string, send func()) bool {
	for stop := time.Now().Add(3 * time.Second); time.Now().Before(stop); time.Sleep(20 * time.Millisecond) {
		if l.has(text) {
			return true
		}
		send()
	}
	return false
}

// vxlanFrame is the content of a tunnel's packet: a datagram for a container.
func vxlanFrame(vni uint32, to MAC, dst netip.Addr, port int, text string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 9)
	udp = binary.BigEndian.AppendUint16(udp, uint16(port))
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(text)))
	udp = append(append(udp, 0, 0), text...)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 7, 0, 99}
	ip = append(ip, dst.AsSlice()...)
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(udp)))
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	f := []byte{8, 0, 0, 0}
	f = append(binary.BigEndian.AppendUint32(f, vni<<8), to[:]...)
	f = append(f, 2, 0, 0, 0, 9, 9, 8, 0)
	return append(append(f, ip...), udp...)
}

// sendUDP sends one datagram, from an address or from any.
func sendUDP(t *testing.T, ns *netnstest.NS, from netip.Addr, to netip.AddrPort, what []byte) {
	t.Helper()
	ns.Do(func() {
		d := net.Dialer{}
		if from.IsValid() {
			d.LocalAddr = &net.UDPAddr{IP: from.AsSlice()}
		}
		c, err := d.Dial("udp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(what) // what nobody takes may be told by the second one
		_ = c.Close()
	})
}

// members makes two hosts that share a network and know each other, the first
// with a bridge of somebody else's on which there are two containers, whose traffic is
// masqueraded.
func members(t *testing.T, v6 bool) (a, b *tunnelEnd, foreign, liar *netnstest.NS) {
	t.Helper()
	a, b = tunnelled(t, v6, 1500)
	for n, e := range []*tunnelEnd{a, b} {
		e.host.Exec("sh", "-ec", `
			for i in all default eth0 wfb0; do echo 0 > /proc/sys/net/ipv4/conf/$i/rp_filter; done
			echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding`)
		e.state.Elements = []Element{
			{Set: SetBridges, Link: "wfb0"}, {Set: SetPass, Link: "wfb0", Out: "wfb0"}, {Set: SetSwitched, Link: "wfb0"},
			{Set: SetTunnels, Port: 4789},
			{Set: SetMembers, Net: hostPrefix(vtep(2-n, v6)), Port: 4789},
		}
		e.host.Do(func() { ensure(t, e.k, e.state) })
	}
	a.host.Exec("sh", "-ec", `
		ip link add docker0 type bridge; ip link set docker0 up
		ip addr add 10.8.0.1/24 dev docker0; ip addr add fd08::1/64 dev docker0 nodad
		for i in 2 3; do ip link add h-e$i type veth peer name e$i; ip link set h-e$i master docker0; ip link set h-e$i up; done
		nft 'table inet theirs { chain post { type nat hook postrouting priority srcnat; oifname "eth0" iifname "docker0" masquerade; }; }'`)
	foreign, liar = netnstest.New(t), netnstest.New(t)
	for n, ns := range map[int]*netnstest.NS{2: foreign, 3: liar} {
		a.host.Do(func() {
			ns.Take(fmt.Sprintf("e%d", n), "eth0", prefix(fmt.Sprintf("10.8.0.%d/24", n)), prefix(fmt.Sprintf("fd08::%d/64", n)))
		})
		ns.Gateway(lanAddr("10.8.0.1"))
		ns.Gateway(lanAddr("fd08::1"))
		passes(t, ns, "eth0")
	}
	return a, b, foreign, liar
}

// TestOverlayMembers: a host takes the frames of a network from the hosts that
// have it and from nobody else, and lets no container pass for such a host.
func TestOverlayMembers(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(vtep(1, v6).String(), func(t *testing.T) {
			a, b, foreign, liar := members(t, v6)
			stranger, gw := lanAddr("192.0.2.9"), lanAddr("10.8.0.1")
			if v6 {
				stranger, gw = lanAddr("2001:db8::9"), lanAddr("fd08::1")
			}
			b.host.Exec("ip", "addr", "add", hostPrefix(stranger).String(), "dev", "eth0", "nodad")
			b.host.Exec("ip", "route", "add", hostPrefix(gw).String(), "via", vtep(1, v6).String())
			liar.Exec("ip", "addr", "add", hostPrefix(vtep(2, v6)).String(), "dev", "lo", "nodad")
			// Another instance uses the same port, with hosts of its own.
			a.host.Do(func() {
				other, err := newFirewall(quiet(), "weft_other")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(other.close)
				mustAdd(t, other, Element{Set: SetTunnels, Port: 4789}, Element{Set: SetMembers, Net: hostPrefix(vtep(77, v6)), Port: 4789})
			})
			here, there := hearken(t, a.container, 9999), hearken(t, b.container, 9999)
			at := func(n int) netip.AddrPort { return netip.AddrPortFrom(vtep(n, v6), 4789) }
			frame := func(n byte, text string) []byte {
				return vxlanFrame(4097, mac(n), lanAddr(fmt.Sprintf("10.7.0.%d", n)), 9999, text)
			}
			if !here.waits("member", func() { sendUDP(t, b.host, vtep(2, v6), at(1), frame(1, "member")) }) {
				t.Fatal("a member's frame does not arrive")
			}
			// The device's socket takes what is for everybody too.
			everybody := map[string]netip.Addr{"by broadcast": lanAddr("192.0.2.255"), "by multicast": lanAddr("224.0.0.1")}
			near := map[string]netip.Addr{"by broadcast": lanAddr("10.8.0.255"), "by multicast": lanAddr("224.0.0.1")}
			if v6 {
				allNodes := func(ns *netnstest.NS) map[string]netip.Addr {
					// By its number: the name's, which net remembers, is another namespace's.
					zone, _, _ := strings.Cut(ns.Exec("ip", "-o", "link", "show", "eth0"), ":")
					return map[string]netip.Addr{"by multicast": lanAddr("ff02::1").WithZone(zone)}
				}
				everybody, near = allNodes(b.host), allNodes(foreign)
			} else {
				b.host.Exec("ip", "route", "add", "224.0.0.0/4", "dev", "eth0")
				foreign.Exec("ip", "route", "add", "224.0.0.0/4", "dev", "eth0")
			}
			attack := func() {
				for how, to := range everybody {
					sendUDP(t, b.host, stranger, netip.AddrPortFrom(to, 4789), frame(1, "stranger, "+how))
				}
				for how, to := range near {
					sendUDP(t, foreign, netip.Addr{}, netip.AddrPortFrom(to, 4789), frame(1, "container, "+how))
				}
				sendUDP(t, b.host, stranger, at(1), frame(1, "stranger"))
				sendUDP(t, b.host, stranger, netip.AddrPortFrom(gw, 4789), frame(1, "stranger, by another address"))
				sendUDP(t, foreign, netip.Addr{}, netip.AddrPortFrom(gw, 4789), frame(1, "container, to its gateway"))
				sendUDP(t, foreign, netip.Addr{}, at(1), frame(1, "container, to its host"))
				sendUDP(t, liar, vtep(2, v6), netip.AddrPortFrom(gw, 4789), frame(1, "container, as a member"))
				sendUDP(t, foreign, netip.Addr{}, at(2), frame(2, "container, to a member"))
			}
			attack()
			// What was sent before it arrives before it.
			for n, l := range map[byte]*hearer{1: here, 2: there} {
				from := map[byte]*tunnelEnd{1: b, 2: a}[n]
				if !l.waits("last", func() { sendUDP(t, from.host, vtep(int(3-n), v6), at(int(n)), frame(n, "last")) }) {
					t.Errorf("a member's frame does not reach host %d", n)
				}
			}
			attacks := []string{"stranger", "stranger, by another address", "container, to its gateway", "container, to its host", "container, as a member", "container, to a member"}
			for how := range near {
				attacks = append(attacks, "stranger, "+how, "container, "+how)
			}
			for _, text := range attacks {
				if here.has(text) || there.has(text) {
					t.Errorf("taken: %s", text)
				}
			}
			for _, e := range []*tunnelEnd{a, b} {
				e.ping(t, "10.7.0.1")
				e.ping(t, "10.7.0.2")
			}
			a.host.Exec("nft", "delete table inet weft; delete table inet weft_other")
			b.host.Exec("nft", "delete table inet weft")
			for _, text := range attacks { // or the test would show nothing
				l := here
				if text == "container, to a member" {
					l = there
				}
				if !l.waits(text, attack) {
					t.Errorf("without the rules it is not taken either: %s", text)
				}
			}
		})
	}
}

// TestOverlaySilent: the host has no address on the bridge of an overlay network,
// and containers on it do not reach the host by its other addresses, or others by
// the host.
func TestOverlaySilent(t *testing.T) {
	a, b, _, _ := members(t, false)
	host, beyond := hearken(t, a.host, 7000), hearken(t, b.host, 7000)
	for _, to := range []string{"192.0.2.1", "192.0.2.2"} {
		a.container.Exec("ip", "neigh", "add", to, "lladdr", a.state.Bridges[0].MAC.String(), "dev", "eth0")
		a.container.Exec("ip", "route", "add", to, "dev", "eth0")
	}
	send := func() {
		sendUDP(t, a.container, netip.Addr{}, netip.MustParseAddrPort("192.0.2.1:7000"), []byte("?"))
		sendUDP(t, a.container, netip.Addr{}, netip.MustParseAddrPort("192.0.2.2:7000"), []byte("?"))
	}
	send()
	sendUDP(t, a.container, netip.Addr{}, netip.MustParseAddrPort("192.0.2.1:7000"), []byte("?"))
	a.ping(t, "10.7.0.2")
	a.ping(t, "fd07::2")
	if host.has("?") || beyond.has("?") {
		t.Errorf("heard by the host: %t, by one beyond: %t", host.has("?"), beyond.has("?"))
	}
	a.host.Exec("nft", "delete table inet weft")
	if !host.waits("?", send) || !beyond.waits("?", send) { // or the test would show nothing
		t.Error("without the rules nobody hears it either")
	}
}
