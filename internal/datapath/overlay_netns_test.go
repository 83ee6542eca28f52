package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/internal/netnstest"
)

// tunnelEnd is one of two hosts that share an underlay, with a container.
type tunnelEnd struct {
	k         *Kernel
	host      *netnstest.NS
	container *netnstest.NS
	state     State
}

// vtep is a host's address on the underlay.
func vtep(n int, v6 bool) netip.Addr {
	if v6 {
		return lanAddr(fmt.Sprintf("2001:db8::%d", n))
	}
	return lanAddr(fmt.Sprintf("192.0.2.%d", n))
}

// overhead is what a tunnel adds to a container's packet.
func overhead(v6 bool) int {
	if v6 {
		return 70
	}
	return 50
}

// overlay is what host n of 2 wants for a network with one container on each.
func overlay(n int, v6 bool, mtu int) State {
	other := 3 - n
	return State{
		Bridges: []Bridge{{Name: "wfb0", MAC: MAC{2, 0, 0, 0, 1, byte(n)}, MTU: mtu, NoSnooping: true}},
		VXLANs: []VXLAN{{Name: "wfx0", Master: "wfb0", VNI: 4097, Port: 4789, Local: vtep(n, v6), MTU: mtu,
			MAC: MAC{2, 0, 0, 0, 2, byte(n)}}},
		Veths: []Veth{{Name: "wfv0", Peer: "wfc0", Master: "wfb0", MTU: mtu, PeerMAC: mac(byte(n))}},
		Forwards: []Forward{
			{Link: "wfx0", VTEP: vtep(other, v6)},
			{Link: "wfx0", MAC: mac(byte(other)), VTEP: vtep(other, v6)},
		},
		Neighbours: []Neighbour{
			{Link: "wfb0", Addr: lanAddr(fmt.Sprintf("10.7.0.%d", other)), MAC: mac(byte(other))},
			{Link: "wfb0", Addr: lanAddr(fmt.Sprintf("fd07::%d", other)), MAC: mac(byte(other))},
		},
		Shortcuts: []Shortcut{
			{Tunnel: "wfx0", Link: "wfx0"},
			{Tunnel: "wfx0", Link: "wfx0", MAC: mac(byte(other))},
			{Tunnel: "wfx0", Link: "wfv0"},
			{Tunnel: "wfx0", Link: "wfv0", MAC: mac(byte(n))},
		},
	}
}

// tunnelled makes two hosts joined by an underlay of that MTU, each with a
// container, and leaves the test in the first.
func tunnelled(t *testing.T, v6 bool, underlay int) (a, b *tunnelEnd) {
	t.Helper()
	a, b = &tunnelEnd{}, &tunnelEnd{}
	b.k, b.host = newKernel(t)
	a.k, a.host = newKernel(t)
	a.host.Exec("sh", "-ec", fmt.Sprintf(`
		ip link add eth0 mtu %d type veth peer name far mtu %[1]d
		ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad
		ip link set eth0 up`, underlay))
	b.host.Take("far", "eth0", prefix("192.0.2.2/24"), prefix("2001:db8::2/64"))
	for n, e := range map[int]*tunnelEnd{1: a, 2: b} {
		e.container = netnstest.New(t)
		e.state = overlay(n, v6, underlay-overhead(v6))
		e.host.Do(func() {
			ensure(t, e.k, e.state)
			e.container.Take("wfc0", "eth0", prefix(fmt.Sprintf("10.7.0.%d/24", n)), prefix(fmt.Sprintf("fd07::%d/64", n)))
		})
	}
	for _, e := range []*tunnelEnd{a, b} {
		passes(t, e.host, "eth0")
		passes(t, e.host, "wfv0")
		passes(t, e.container, "eth0")
	}
	// An IPv6 address is usable some milliseconds after its interface is.
	a.host.Exec("sh", "-ec", fmt.Sprintf("for i in 1 2 3; do busybox ping -c 1 -W 1 %s && exit; done; exit 1", vtep(2, v6)))
	return a, b
}

// passes waits until a link is up for the kernel too, which drops what it is to
// send before.
func passes(t *testing.T, ns *netnstest.NS, link string) {
	t.Helper()
	for stop := time.Now().Add(5 * time.Second); !strings.Contains(ns.Exec("ip", "-br", "link", "show", link), " UP "); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(stop) {
			t.Fatalf("%s is not up", link)
		}
	}
}

func (e *tunnelEnd) same(t *testing.T) {
	t.Helper()
	e.host.Do(func() { same(t, e.k, e.state) })
}

// ping fails the test unless the container reaches the address.
func (e *tunnelEnd) ping(t *testing.T, to string) {
	t.Helper()
	if out, err := e.container.Output("busybox", "ping", "-c", "1", "-W", "3", to); err != nil {
		t.Errorf("ping %s: %v\n%s", to, err, out)
	}
}

// capture starts to listen on a namespace's eth0 and returns what stops it and
// tells what was heard, after waiting for that many frames.
func capture(t *testing.T, ns *netnstest.NS, filter string) (heard func(least int) string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "heard")
	cmd := ns.Start("sh", "-c", "exec tcpdump --immediate-mode -l -n -e -i eth0 '"+filter+"' >"+file+" 2>&1")
	for stop := time.Now().Add(5 * time.Second); !strings.Contains(read(t, file), "listening"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(stop) {
			t.Fatal("tcpdump does not listen: ", read(t, file))
		}
	}
	frames := func() (lines []string) {
		for line := range strings.Lines(read(t, file)) {
			if strings.Contains(line, " > ") && strings.Contains(line, "length") {
				lines = append(lines, line)
			}
		}
		return lines
	}
	return func(least int) string {
		t.Helper()
		for stop := time.Now().Add(3 * time.Second); len(frames()) < least && time.Now().Before(stop); {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond) // for one too many
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		return strings.Join(frames(), "")
	}
}

func TestOverlayEnsureOwnedRemove(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(vtep(1, v6).String(), func(t *testing.T) {
			k, host := newKernel(t)
			host.Exec("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
			s := overlay(1, v6, 1400)
			lines := ensure(t, k, s)
			for _, want := range []string{"vxlan wfx0: made in wfb0", "vxlan wfx0: 2 forwarding entries", "bridge wfb0: 2 neighbours", "nft table netdev weft: 4 shortcuts past the bridge"} {
				if !strings.Contains(strings.Join(lines, "\n"), want) {
					t.Errorf("changes %q lack %q", lines, want)
				}
			}
			same(t, k, s)
			if lines := ensure(t, k, s); len(lines) != 0 {
				t.Errorf("the second time changed %q", lines)
			}
			if got := host.Exec("ip", "-6", "addr", "show", "dev", "wfb0"); got != "" {
				t.Errorf("the bridge has an address: %s", got)
			}
			if got := strings.TrimSpace(host.Exec("sysctl", "-n", "net.ipv4.conf.wfb0.arp_ignore")); got != "8" {
				t.Errorf("the bridge answers for the host's other addresses: arp_ignore is %s", got)
			}
			detail := host.Exec("ip", "-d", "link", "show", "wfx0")
			for _, want := range []string{"id 4097", "local " + vtep(1, v6).String(), "dstport 4789", "nolearning", "neigh_suppress on", "learning off", "mtu 1400", " udpcsum", "noudp6zerocsumtx"} {
				if !strings.Contains(detail, want) {
					t.Errorf("the device lacks %q: %s", want, detail)
				}
			}
			if got := strings.Contains(detail, " udp6zerocsumrx"); got != v6 {
				t.Errorf("accepts no checksum: %t, want %t", got, v6)
			}
			// Without their links, and with them.
			entries := State{Forwards: s.Forwards, Neighbours: s.Neighbours, Shortcuts: s.Shortcuts[1:]}
			remove(t, k, entries)
			rest := s
			rest.Forwards, rest.Neighbours, rest.Shortcuts = nil, nil, s.Shortcuts[:1]
			same(t, k, rest)
			if got := host.Exec("bridge", "fdb", "show", "dev", "wfx0"); strings.Contains(got, "static") || strings.Contains(got, "self") {
				t.Errorf("entries are left: %s", got)
			}
			remove(t, k, entries)
			ensure(t, k, s)
			remove(t, k, s)
			same(t, k, State{})
			if got := host.Exec("nft", "list", "tables", "netdev"); got != "" {
				t.Errorf("left behind: %s", got)
			}
			remove(t, k, s)
		})
	}
}

func TestOverlayString(t *testing.T) {
	want := `link add wfb0 address 02:00:00:00:01:01 mtu 1430 type bridge mcast_snooping 0
link add wfx0 address 02:00:00:00:02:01 master wfb0 mtu 1430 type vxlan id 4097 local 2001:db8::1 dstport 4789 nolearning udp6zerocsumrx
bridge link set dev wfx0 neigh_suppress on learning off
link add wfv0 master wfb0 mtu 1430 type veth peer wfc0 address 02:42:00:00:00:01
bridge fdb append 00:00:00:00:00:00 dev wfx0 dst 2001:db8::2
bridge fdb replace 02:42:00:00:00:02 dev wfx0 dst 2001:db8::2 self master static
neigh replace 10.7.0.2 lladdr 02:42:00:00:00:02 dev wfb0 nud permanent
neigh replace fd07::2 lladdr 02:42:00:00:00:02 dev wfb0 nud permanent
nft add rule netdev weft wfx0 fwd to ether daddr map @here_wfx0
nft add element netdev weft away_wfx0 { 02:42:00:00:00:02 : wfx0 }
nft add rule netdev weft wfv0 fwd to ether daddr map @away_wfx0
nft add element netdev weft here_wfx0 { 02:42:00:00:00:01 : wfv0 }
`
	s := overlay(1, true, 1430)
	if d := cmp.Diff(want, s.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	var twice State
	twice.Add(s)
	twice.Add(s)
	if m := twice.Minus(s); !m.Empty() || s.Empty() || twice.Minus(State{}).String() != want {
		t.Errorf("twice the same is more:\n%s", m)
	}
}

func TestOverlayTraffic(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, mtu := range []int{1400, 9000} {
			t.Run(fmt.Sprintf("%s %d", vtep(1, v6), mtu), func(t *testing.T) {
				a, b := tunnelled(t, v6, mtu)
				for _, to := range []string{"10.7.0.2", "fd07::2"} {
					a.ping(t, to)
				}
				for _, to := range []string{"10.7.0.1", "fd07::1"} {
					b.ping(t, to)
					largest(t, b, to, mtu-overhead(v6))
				}
				a.same(t)
				b.same(t)
				for _, e := range []*tunnelEnd{a, b} { // nothing learned
					out := e.host.Exec("bridge", "fdb", "show", "dev", "wfx0")
					for line := range strings.Lines(out) {
						if !strings.Contains(line, "static") && !strings.Contains(line, "permanent") {
							t.Errorf("learned: %s", line)
						}
					}
				}
			})
		}
	}
}

// largest checks that a packet of the MTU gets through unfragmented, and that
// one byte more is refused where it is sent, with the MTU.
func largest(t *testing.T, from *tunnelEnd, to string, mtu int) {
	t.Helper()
	a := lanAddr(to)
	family, headers := unix.AF_INET, 28
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 7, 0, a.AsSlice()[3]}}
	if a.Is6() {
		family, headers, sa = unix.AF_INET6, 48, &unix.SockaddrInet6{Port: 9, Addr: a.As16()}
	}
	from.container.Do(func() {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		tv := unix.NsecToTimeval((3 * time.Second).Nanoseconds())
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		level, discover, pmtu := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU
		if a.Is6() {
			level, discover, pmtu = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU
		}
		if err == nil {
			err = unix.SetsockoptInt(fd, level, discover, unix.IP_PMTUDISC_DO)
		}
		if err == nil {
			err = unix.Connect(fd, sa)
		}
		if err != nil {
			t.Fatal(err)
		}
		// Nobody listens: what arrives is answered with "port unreachable".
		if _, err := unix.Write(fd, make([]byte, mtu-headers)); err != nil {
			t.Errorf("%d bytes to %s: %v", mtu, to, err)
		}
		if _, err := unix.Read(fd, make([]byte, 1)); err != unix.ECONNREFUSED {
			t.Errorf("%d bytes to %s did not arrive: %v", mtu, to, err)
		}
		if _, err := unix.Write(fd, make([]byte, mtu-headers+1)); err != unix.EMSGSIZE {
			t.Errorf("%d bytes to %s: %v, want %v", mtu+1, to, err, syscall.EMSGSIZE)
		}
		if got, err := unix.GetsockoptInt(fd, level, pmtu); err != nil || got != mtu {
			t.Errorf("path MTU to %s %d, %v, want %d", to, got, err, mtu)
		}
	})
}

// TestOverlayFlood: what is for everybody reaches the other host's containers,
// and so does what is for a hardware address that nobody knows.
func TestOverlayFlood(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(vtep(1, v6).String(), func(t *testing.T) {
			a, b := tunnelled(t, v6, 1500)
			a.container.Exec("sh", "-ec", `
				ip route add 239.1.2.3/32 dev eth0
				ip neigh add 10.7.0.77 lladdr 02:42:00:00:00:77 dev eth0 nud permanent`)
			// By its number: the net package remembers for a minute which one a name
			// has, and in another test's namespace eth0 had another.
			number, _, _ := strings.Cut(a.container.Exec("ip", "-o", "link", "show", "eth0"), ":")
			for _, c := range []struct{ name, network, to string }{
				{"broadcast", "udp4", "10.7.0.255:999"},
				{"multicast", "udp4", "239.1.2.3:999"},
				{"multicast, IPv6", "udp6", "[ff02::4242%" + number + "]:999"},
				{"unknown unicast", "udp4", "10.7.0.77:999"},
			} {
				heard := capture(t, b.container, "udp port 999")
				a.container.Do(func() {
					conn, err := net.Dial(c.network, c.to)
					if err != nil {
						t.Fatal(c.name, err)
					}
					defer func() { _ = conn.Close() }()
					if raw, err := conn.(*net.UDPConn).SyscallConn(); err == nil {
						_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
					}
					if _, err := conn.Write([]byte("hello")); err != nil {
						t.Error(c.name, err)
					}
				})
				if got := heard(1); strings.Count(got, "\n") != 1 {
					t.Errorf("%s: heard %q, want it once", c.name, got)
				}
			}
		})
	}
}

// TestOverlayAnswersForOthers: requests for an address that is known do not
// leave the host.
func TestOverlayAnswersForOthers(t *testing.T) {
	a, b := tunnelled(t, false, 1500)
	b.host.Exec("ip", "link", "set", "wfx0", "down")
	heard := capture(t, a.host, "udp port 4789")
	a.container.Exec("sh", "-ec", "ip neigh flush dev eth0; busybox arping -c 1 -w 2 -I eth0 10.7.0.2 >/dev/null; busybox ping -c 1 -W 1 fd07::2 || true; busybox ping -c 1 -W 1 10.7.0.2 || true")
	for _, addr := range []string{"10.7.0.2", "fd07::2"} {
		if got := a.container.Exec("ip", "neigh", "show", addr); !strings.Contains(got, mac(2).String()) {
			t.Errorf("%s is known as %q, want %s", addr, got, mac(2))
		}
	}
	if got := heard(2); strings.Contains(got, "ARP") || strings.Contains(got, "neighbor solicitation") {
		t.Errorf("asked the other host:\n%s", got)
	}
	// An address that nobody here knows is asked for over there.
	heard = capture(t, a.host, "udp port 4789")
	_, _ = a.container.Output("busybox", "ping", "-c", "1", "-W", "1", "10.7.0.99")
	if got := heard(2); !strings.Contains(got, "who-has 10.7.0.99") {
		t.Errorf("an unknown address was not asked for:\n%s", got)
	}
}

// TestOverlayAnnounce: an announcement out of the bridge reaches the host's own
// containers and stays there.
func TestOverlayAnnounce(t *testing.T) {
	a, b := tunnelled(t, false, 1500)
	heard := capture(t, b.container, "arp or icmp6")
	for _, addr := range []string{"10.7.0.9", "fd07::9"} {
		a.container.Exec("ip", "neigh", "replace", addr, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "stale")
		a.host.Do(func() {
			if err := a.k.Announce("wfb0", lanAddr(addr), mac(9)); err != nil {
				t.Fatal(err)
			}
		})
		got := ""
		for stop := time.Now().Add(2 * time.Second); time.Now().Before(stop) && !strings.Contains(got, mac(9).String()); time.Sleep(5 * time.Millisecond) {
			got = a.container.Exec("ip", "neigh", "show", addr)
		}
		if !strings.Contains(got, mac(9).String()) {
			t.Errorf("%s is known as %s, want %s", addr, got, mac(9))
		}
	}
	if got := heard(0); strings.Contains(got, mac(9).String()) {
		t.Errorf("the announcement went through the tunnel:\n%s", got)
	}
	if got := a.host.Exec("bridge", "fdb", "show", "br", "wfb0"); strings.Contains(got, mac(9).String()) {
		t.Errorf("the bridge learned the announced address:\n%s", got)
	}
}

func TestOverlayMends(t *testing.T) {
	for name, damage := range map[string]string{
		"device gone":            "ip link del wfx0",
		"device down":            "ip link set wfx0 down",
		"device out":             "ip link set wfx0 nomaster",
		"device elsewhere":       "ip link add other type bridge; ip link set wfx0 master other",
		"device MTU":             "ip link set wfx0 mtu 1300",
		"device MAC":             "ip link set wfx0 address 02:00:00:00:77:77",
		"device learns":          "ip link set wfx0 type vxlan learning",
		"other VNI":              "ip link del wfx0; ip link add wfx0 group 2003134068 mtu 1400 address 02:00:00:00:02:01 master wfb0 type vxlan id 7 local 192.0.2.1 dstport 4789 nolearning",
		"port learns":            "bridge link set dev wfx0 learning on",
		"port does not suppress": "bridge link set dev wfx0 neigh_suppress off",
		"bridge gone":            "ip link del wfb0",
		"bridge down":            "ip link set wfb0 down",
		"bridge snoops":          "ip link set wfb0 type bridge mcast_snooping 1",
		"flood entry":            "bridge fdb del 00:00:00:00:00:00 dev wfx0 dst 192.0.2.2",
		"flood entry ages":       "bridge fdb del 00:00:00:00:00:00 dev wfx0 dst 192.0.2.2; bridge fdb append 00:00:00:00:00:00 dev wfx0 dst 192.0.2.2 dynamic",
		"device's entry":         "bridge fdb del 02:42:00:00:00:02 dev wfx0 self",
		"bridge's entry":         "bridge fdb del 02:42:00:00:00:02 dev wfx0 master",
		"both entries":           "bridge fdb del 02:42:00:00:00:02 dev wfx0 self master",
		"entry elsewhere":        "bridge fdb replace 02:42:00:00:00:02 dev wfx0 dst 192.0.2.9 self",
		"bridge's entry moved":   "bridge fdb replace 02:42:00:00:00:02 dev wfv0 master static",
		"bridge's entry ages":    "bridge fdb replace 02:42:00:00:00:02 dev wfx0 master dynamic",
		"neighbour":              "ip neigh del 10.7.0.2 dev wfb0",
		"neighbour, IPv6":        "ip neigh del fd07::2 dev wfb0",
		"neighbour's MAC":        "ip neigh replace 10.7.0.2 lladdr 02:00:00:00:00:99 dev wfb0 nud permanent",
		"hook gone":              "nft delete chain netdev weft wfv0",
		"hook idle":              "nft flush chain netdev weft wfx0",
		"hook elsewhere":         "nft delete chain netdev weft wfv0; nft add chain netdev weft wfv0 '{ type filter hook ingress device lo priority 0; }'",
		"hook does more":         "nft add rule netdev weft wfx0 drop",
		"shortcut gone":          "nft delete element netdev weft here_wfx0 '{ 02:42:00:00:00:01 }'",
		"shortcut elsewhere":     "nft delete element netdev weft away_wfx0 '{ 02:42:00:00:00:02 }'; nft add element netdev weft away_wfx0 '{ 02:42:00:00:00:02 : lo }'",
		"shortcut back":          "nft delete element netdev weft here_wfx0 '{ 02:42:00:00:00:01 }'; nft add element netdev weft here_wfx0 '{ 02:42:00:00:00:01 : wfx0 }'",
		"table of shortcuts":     "nft delete table netdev weft",
		"neighbour ages":         "ip neigh replace 10.7.0.2 lladdr 02:42:00:00:00:02 dev wfb0 nud stale",
	} {
		t.Run(name, func(t *testing.T) {
			k, host := newKernel(t)
			s := overlay(1, false, 1400)
			ensure(t, k, s)
			host.Exec("sh", "-ec", damage)
			if have := owned(t, k); s.Minus(have).Empty() && have.Minus(s).Empty() {
				t.Error("Owned does not show the damage")
			}
			if lines := ensure(t, k, s); len(lines) == 0 {
				t.Error("nothing mended")
			}
			same(t, k, s)
			if lines := ensure(t, k, s); len(lines) != 0 {
				t.Errorf("mended again: %q", lines)
			}
		})
	}
}

// A host that gets another address: the device is made again, with all that
// leads to others.
func TestOverlayOtherLocal(t *testing.T) {
	for name, change := range map[string]func(*VXLAN){
		"local": func(v *VXLAN) { v.Local = lanAddr("192.0.2.11") },
		"IPv6":  func(v *VXLAN) { v.Local = lanAddr("2001:db8::1") },
		"VNI":   func(v *VXLAN) { v.VNI = 7 },
		"port":  func(v *VXLAN) { v.Port = 8472 },
	} {
		t.Run(name, func(t *testing.T) {
			k, _ := newKernel(t)
			s := overlay(1, false, 1400)
			ensure(t, k, s)
			change(&s.VXLANs[0])
			for i := range s.Forwards {
				s.Forwards[i].VTEP = vtep(2, s.VXLANs[0].Local.Is6())
			}
			lines := ensure(t, k, s)
			if !strings.Contains(strings.Join(lines, "\n"), "vxlan wfx0: made again in wfb0") {
				t.Errorf("changes %q", lines)
			}
			same(t, k, s)
			if lines := ensure(t, k, s); len(lines) != 0 {
				t.Errorf("changed again: %q", lines)
			}
		})
	}
}

func TestOverlayRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		how   string
		v6    bool
		words []string
	}{
		"VNI taken":          {"ip link add theirs type vxlan id 4097 dstport 4789 local 192.0.2.7", false, []string{"wfx0", "VNI 4097", "port 4789", "another vni or port"}},
		"VNI taken, IPv6":    {"ip link add theirs type vxlan id 4097 dstport 4789 local 2001:db8::7 udp6zerocsumrx", true, []string{"VNI 4097", "another vni or port"}},
		"port cannot share":  {"ip link add theirs type vxlan id 1 dstport 4789 local 2001:db8::7; ip link set theirs up", true, []string{"wfx0", "port 4789", "another port"}},
		"name taken, bridge": {"ip link add wfx0 type bridge", false, []string{"wfx0", "not ours"}},
		"name taken":         {"ip link add wfx0 type vxlan id 4097 dstport 4789 local 192.0.2.7", false, []string{"wfx0", "not ours"}},
	} {
		t.Run(name, func(t *testing.T) {
			k, host := newKernel(t)
			host.Exec("sh", "-ec", c.how)
			before := host.Exec("ip", "-o", "link")
			s := overlay(1, c.v6, 1400)
			_, err := k.Ensure(t.Context(), s)
			wantError(t, err, c.words...)
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %v", err)
			}
			same(t, k, State{})
			if after := host.Exec("ip", "-o", "link"); after != before {
				t.Errorf("links changed:\n%s", cmp.Diff(before, after))
			}
		})
	}
	k, host := newKernel(t)
	host.Exec("ip", "link", "add", "wfx0", "type", "vxlan", "id", "7", "dstport", "4789", "local", "192.0.2.7")
	before := host.Exec("ip", "-o", "link")
	remove(t, k, overlay(1, false, 1400))
	if after := host.Exec("ip", "-o", "link"); after != before {
		t.Errorf("another's device was changed:\n%s", cmp.Diff(before, after))
	}
	v := overlay(1, false, 1400).VXLANs
	v[0].Name, v[0].Master = "wfx1", "none"
	_, err := k.Ensure(t.Context(), State{VXLANs: v})
	wantError(t, err, "wfx1", "none", "does not exist")
	v[0].Master = "wfx0"
	_, err = k.Ensure(t.Context(), State{VXLANs: v})
	wantError(t, err, "wfx1", "wfx0", "not a bridge")
}

// What somebody added by hand is seen, and can be removed.
func TestOverlayStrayEntries(t *testing.T) {
	k, host := newKernel(t)
	s := overlay(1, false, 1400)
	ensure(t, k, s)
	host.Exec("sh", "-ec", `
		bridge fdb append 00:00:00:00:00:00 dev wfx0 dst 192.0.2.66
		bridge fdb add 02:00:00:00:00:66 dev wfx0 dst 192.0.2.66
		bridge fdb add 02:00:00:00:00:67 dev wfx0 master static
		ip neigh add 10.7.0.66 lladdr 02:00:00:00:00:66 dev wfb0 nud permanent
		ip neigh add fd07::66 lladdr 02:00:00:00:00:66 dev wfb0 nud permanent`)
	stray := owned(t, k).Minus(s)
	if len(stray.Forwards) != 3 || len(stray.Neighbours) != 2 {
		t.Errorf("stray:\n%s", stray)
	}
	remove(t, k, stray)
	same(t, k, s)
	remove(t, k, stray)
	same(t, k, s)
}

// A container that moves to another host: the new entry replaces the old one,
// whose removal comes late and must not touch it.
func TestOverlayMovedContainer(t *testing.T) {
	k, host := newKernel(t)
	s := overlay(1, false, 1400)
	ensure(t, k, s)
	old := State{Forwards: []Forward{s.Forwards[1]}}
	s.Forwards[1].VTEP = vtep(3, false)
	if lines := ensure(t, k, State{Forwards: s.Forwards[1:]}); len(lines) != 1 {
		t.Errorf("changes %q", lines)
	}
	same(t, k, s)
	remove(t, k, old)
	same(t, k, s)
	// One that the bridge has learned on a local port, before it moved away.
	remove(t, k, State{Forwards: s.Forwards[1:]})
	host.Exec("ip", "link", "set", "wfc0", "up")
	passes(t, host, "wfv0") // no port learns before
	host.Exec("bridge", "fdb", "replace", mac(2).String(), "dev", "wfv0", "master", "dynamic")
	ensure(t, k, State{Forwards: s.Forwards[1:]})
	same(t, k, s)
	if got := host.Exec("bridge", "fdb", "show", "dev", "wfv0"); strings.Contains(got, mac(2).String()) {
		t.Errorf("the bridge still has it on a local port: %s", got)
	}
}

// Two containers on two hosts may have one MAC, after a partition: what the one
// here says does not lead to it what is for the other.
func TestOverlayUsurpedMAC(t *testing.T) {
	a, _ := tunnelled(t, false, 1500)
	a.container.Exec("ip", "link", "set", "eth0", "address", mac(2).String())
	for range 2 {
		a.container.Exec("sh", "-c", "busybox ping -c 1 -W 1 10.7.0.9 || true")
		a.same(t)
		// Also where the entry was mended.
		a.host.Exec("bridge", "fdb", "replace", mac(2).String(), "dev", "wfv0", "master", "dynamic")
		a.host.Do(func() { ensure(t, a.k, a.state) })
		a.same(t)
	}
}

// Cancelled at any step, Ensure leaves nothing and the next call succeeds; and
// whatever object cannot be made, nothing is left of the others, and what was
// there before stays.
func TestOverlayFailingLeavesNothing(t *testing.T) {
	k, _ := newKernel(t)
	s := overlay(1, false, 1400)
	for step := 0; ; step++ {
		_, err := k.Ensure(newCountdown(t, step), s)
		if err == nil {
			if step < 5 {
				t.Errorf("only %d steps look at the context", step)
			}
			break
		}
		same(t, k, State{})
	}
	same(t, k, s)
	for name, spoil := range map[string]struct {
		how  string
		f    func(*State)
		word string
	}{
		"bridge":           {how: "ip link add wfb1 type bridge", word: "wfb1"},
		"device":           {how: "ip link add wfx1 type bridge", word: "wfx1"},
		"veth":             {how: "ip link add wfv1 type bridge", word: "wfv1"},
		"forward's link":   {f: func(s *State) { s.Forwards[2].Link = "none" }, word: "none"},
		"forward's VTEP":   {f: func(s *State) { s.Forwards[2].VTEP = netip.Addr{} }, word: "wfx1"},
		"neighbour's link": {f: func(s *State) { s.Neighbours[2].Link = "none" }, word: "none"},
		"neighbour":        {f: func(s *State) { s.Neighbours[2].Addr = netip.Addr{} }, word: "wfb1"},
		"shortcut's link":  {f: func(s *State) { s.Shortcuts[2].Link = "none" }, word: "none"},
		"hook's link":      {f: func(s *State) { s.Shortcuts[1].Link = "none" }, word: "none"},
		"element":          {f: func(s *State) { s.Elements = append(s.Elements, Element{Set: SetPublished}) }, word: "published"},
	} {
		t.Run(name, func(t *testing.T) {
			k, host := newKernel(t)
			before := overlay(1, false, 1400)
			ensure(t, k, before)
			s := State{
				Bridges:    []Bridge{{Name: "wfb1", MTU: 1400, NoSnooping: true}},
				VXLANs:     []VXLAN{{Name: "wfx1", Master: "wfb1", VNI: 5, Port: 4789, Local: vtep(1, false), MTU: 1400}},
				Veths:      []Veth{{Name: "wfv1", Peer: "wfc1", Master: "wfb1", MTU: 1400}},
				Forwards:   []Forward{{Link: "wfx0", VTEP: vtep(9, false)}, {Link: "wfx0", MAC: mac(9), VTEP: vtep(9, false)}, {Link: "wfx1", MAC: mac(9), VTEP: vtep(9, false)}},
				Neighbours: []Neighbour{{Link: "wfb0", Addr: lanAddr("10.7.0.9"), MAC: mac(9)}, {Link: "wfb0", Addr: lanAddr("fd07::9"), MAC: mac(9)}, {Link: "wfb1", Addr: lanAddr("10.7.0.9"), MAC: mac(9)}},
				Shortcuts: []Shortcut{{Tunnel: "wfx1", Link: "wfx1"}, {Tunnel: "wfx1", Link: "wfv1"}, {Tunnel: "wfx1", Link: "wfv1", MAC: mac(1)},
					{Tunnel: "wfx0", Link: "wfx0", MAC: mac(9)}},
			}
			s.Add(before)
			if spoil.f != nil {
				spoil.f(&s)
			} else {
				host.Exec("sh", "-ec", spoil.how)
			}
			_, err := k.Ensure(t.Context(), s)
			wantError(t, err, spoil.word)
			same(t, k, before)
		})
	}
}

// manyForwards are entries for n containers of three other hosts.
func manyForwards(n int) State {
	var s State
	for i := range n {
		m := MAC{2, 0x42, 10, 7, byte(i >> 8), byte(i)}
		s.Forwards = append(s.Forwards, Forward{Link: "wfx0", MAC: m, VTEP: vtep(2+i%3, false)})
		s.Neighbours = append(s.Neighbours,
			Neighbour{Link: "wfb0", Addr: netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)}), MAC: m},
			Neighbour{Link: "wfb0", Addr: lanAddr(fmt.Sprintf("fd08::%x", i)), MAC: m})
	}
	return s
}

func TestOverlayManyEntries(t *testing.T) {
	k, host := newKernel(t)
	s := overlay(1, false, 1400)
	s.Add(manyForwards(5000))
	start := time.Now()
	ensure(t, k, s)
	t.Logf("ensure: %v", time.Since(start))
	start = time.Now()
	same(t, k, s)
	t.Logf("owned: %v", time.Since(start))
	start = time.Now()
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("the second time changed %q", lines)
	}
	t.Logf("ensure again: %v", time.Since(start))
	many := manyForwards(5000)
	start = time.Now()
	remove(t, k, many)
	t.Logf("remove: %v", time.Since(start))
	same(t, k, overlay(1, false, 1400))
	ensure(t, k, many)
	host.Exec("ip", "link", "del", "wfx0") // all at once
	ensure(t, k, s)
	same(t, k, s)
	start = time.Now()
	remove(t, k, s)
	t.Logf("remove with links: %v", time.Since(start))
	same(t, k, State{})
}

// A container that starts on another host, among 5000 known ones.
func BenchmarkEnsureForward(b *testing.B) {
	k, _ := newKernel(b)
	ensure(b, k, overlay(1, false, 1400))
	ensure(b, k, manyForwards(5000))
	one := State{Forwards: []Forward{{Link: "wfx0", MAC: mac(200), VTEP: vtep(2, false)}}}
	for b.Loop() {
		ensure(b, k, one)
		b.StopTimer()
		remove(b, k, one)
		b.StartTimer()
	}
}
