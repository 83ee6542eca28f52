package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// reach is what holds on every host, whoever else filters there.
var reach = []probe{
	{"out", "host:80", "a1:8080 out"},
	{"out", "host:81", "a1:8081 out"},
	{"out", "host:90", "b1:8080 out"},
	{"out", "host:92", "c1:8080 out"},
	{"out", "host:93", ""}, // internal
	{"out", "host:82", ""},
	{"host", "host:80", "a1:8080 gw200"},
	{"host", "host:81", "a1:8081 gw200"},
	{"host", "a1:8080", "a1:8080 gw1"},
	{"host", "i1:8080", "i1:8080 gw3"},
	{"a1", "host:80", "a1:8080 gw1"}, // itself
	{"a2", "host:80", "a1:8080 gw1"},
	{"b1", "host:80", "a1:8080 b1"},
	{"c1", "host:80", "host:80 c1"}, // ICC off: the proxy's part
	{"c1", "host:92", "host:92 c1"},
	{"c2", "host:92", "host:92 c2"},
	{"r1", "host:80", "a1:8080 r1"},
	{"e1", "host:80", "a1:8080"},
	{"i1", "host:80", ""},
	{"a1", "host:93", ""},

	{"a1", "a2:8080", "a2:8080 a1"},
	{"a1", "b1:8080", ""},
	{"b1", "a1:8080", ""},
	{"a1", "o1:8080", "o1:8080 a1"}, // open to the outside, other networks included
	{"a1", "r1:8080", "r1:8080 a1"},
	{"a1", "r1:8081", ""},
	{"i1", "o1:8080", ""},
	{"c1", "o1:8080", ""}, // ICC off: kept in
	{"e1", "a1:8080", ""},
	{"e1", "o1:8080", "o1:8080"},
	{"c1", "c2:8080", ""},
	{"i1", "i2:8080", "i2:8080 i1"},
	{"i1", "a1:8080", ""},
	{"a1", "i1:8080", ""},

	{"a1", "out:8080", "out:8080 gw200"},
	{"c1", "out:8080", "out:8080 gw200"},
	{"o1", "out:8080", "out:8080 gw200"},
	{"s1", "out:8080", "out:8080 gw200.5"},
	{"r1", "out:8080", "out:8080 r1"},
	{"i1", "out:8080", ""},

	{"out", "a1:8080", ""},
	{"out", "b1:8080", ""},
	{"out", "i1:8080", ""},
	{"out", "s1:8080", ""},
	{"out", "s1:8081", "s1:8081 out"}, // trusted for this port
	{"far", "s1:8081", ""},
	{"out", "o1:8080", "o1:8080 out"},
	{"out", "o1:8081", "o1:8081 out"},
	{"out", "r1:8080", "r1:8080 out"},
	{"out", "r1:8081", ""},
}

// reachEngine is what holds where an engine filters as well.
var reachEngine = []probe{
	{"e1", "out:8080", "out:8080 gw200"},
	{"out", "host:94", "e1:8080 out"},
	{"a1", "host:94", "e1:8080"},
	{"a1", "e1:8081", ""},
	{"n1", "host:80", ""}, // the engine's internal network
	{"n1", "out:8080", ""},
	{"n1", "o1:8080", ""},
	{"out", "far:8080", ""},
}

func TestReach(t *testing.T) {
	for _, variant := range []string{"", "nft", "legacy"} {
		for _, bridgeNF := range []bool{true, false} {
			t.Run(fmt.Sprintf("engine=%s,brnf=%t", variant, bridgeNF), func(t *testing.T) {
				w := newWorld(t, bridgeNF)
				w.serve("host", 80)
				w.serve("host", 92)
				if variant != "" {
					w.engine(variant)
				}
				if _, err := w.fw.add(t.Context(), w.elements()); err != nil {
					t.Fatal(err)
				}
				if _, err := w.hook.ensure(t.Context()); err != nil {
					t.Fatal(err)
				}
				for family := range 2 {
					w.run(family, reach)
					if variant != "" {
						w.run(family, reachEngine)
					} else {
						w.run(family, []probe{{"out", "far:8080", "far:8080 out"}})
					}
				}
				w.run(0, []probe{{"host", "local:80", "a1:8080 gw1"}, {"host", "local:81", ""}})
				w.run(1, []probe{{"host", "local:80", "host:80"}}) // the proxy's part
				w.ping(map[[2]string]bool{
					{"out", "r1"}: true,
					{"out", "o1"}: true,
					{"out", "a1"}: false,
					{"a1", "out"}: true,
					{"a1", "b1"}:  false,
					{"e1", "r1"}:  true,
					{"a1", "r1"}:  true,
				})
			})
		}
	}
}

// ping sends echo requests from one to another and expects an answer or none.
func (w *world) ping(want map[[2]string]bool) {
	w.t.Helper()
	var wg sync.WaitGroup
	for p, want := range want {
		for _, a := range w.addr[p[1]] {
			wg.Go(func() {
				if out, err := w.ns[p[0]].Output("busybox", "ping", "-c1", "-W1", a.String()); (err == nil) != want {
					w.t.Errorf("ping from %s to %s (%s): got %v, want success %t\n%s", p[0], p[1], a, err, want, out)
				}
			})
		}
	}
	wg.Wait()
}

// Our bridges route 127.0.0.0/8, and a published port of the host's loopback
// address is translated before the kernel looks for martians: whoever is beside
// the host must get at neither.
func TestReachHostLoopback(t *testing.T) {
	w := newWorld(t, true)
	w.serve("host", 7000)
	w.neighbour("l1", "wfs1", 152) // the LAN, by the host's own sub-interface
	w.sysctl("ipv4/conf/wfs1/route_localnet", "1")
	loopback := [2]netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("::1/128")}
	els := append(w.elements(), Element{Set: SetOwn, Link: "wfs1"})
	els = append(els, w.published(loopback, 83, "b1", 8080)...)
	from := map[string]string{"a1": "10.1.0.1", "e1": "10.8.0.1", "out": "10.200.0.1", "l1": "10.152.0.1"}
	for name, gw := range from {
		w.ns[name].Exec("sh", "-ec", "ip route del local 127.0.0.0/8 dev lo table local; ip route del local 127.0.0.1 dev lo table local; ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via "+gw+"; echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet")
	}
	w.run(0, []probe{{"a1", "local:7000", "host:7000 a1"}, {"l1", "local:7000", "host:7000 l1"}}) // or the test would show nothing
	if _, err := w.fw.add(t.Context(), els); err != nil {
		t.Fatal(err)
	}
	probes := []probe{{"a1", "host:7000", "host:7000 a1"}, {"host", "local:80", "a1:8080 gw1"}, {"host", "local:83", "b1:8080 gw2"}}
	for name := range from {
		for _, port := range []string{"80", "83", "7000"} {
			probes = append(probes, probe{name, "local:" + port, ""})
		}
	}
	w.run(0, probes)
	// Of IPv6 the kernel takes no packet for [::1] from outside.
	for name, gw := range from {
		w.ns[name].Exec("sh", "-ec", "ip -6 addr del ::1/128 dev lo; ip -6 route add ::1 via fd00:"+strings.Split(gw, ".")[1]+"::1")
	}
	probes = nil
	for name := range from {
		for _, port := range []string{"80", "83", "7000"} {
			probes = append(probes, probe{name, "local:" + port, ""})
		}
	}
	w.run(1, probes)

	// Nor must anybody pass for the host itself. (The kernel alone sees to that for
	// 127.0.0.1, an address of a link, and with rp_filter for the rest.)
	w.sysctl("ipv4/conf/all/rp_filter", "0")
	w.sysctl("ipv4/conf/wfa/rp_filter", "0")
	heard := func() bool {
		w.mu.Lock()
		clear(w.heard)
		w.mu.Unlock()
		w.ns["a2"].Do(func() {
			w.sysctl("ipv4/conf/all/route_localnet", "1")
			d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}}
			c, err := d.Dial("udp", "10.200.0.1:7000")
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write([]byte("?"))
			_ = c.Close()
		})
		time.Sleep(300 * time.Millisecond)
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.heard["host 127.0.0.2"]
	}
	if heard() {
		t.Error("the host heard a container as 127.0.0.2")
	}
	w.host.Exec("nft", "delete table inet "+tableName)
	if !heard() { // or the test would show nothing
		t.Error("without the rule it did not either")
	}
}

// The guard stops what is forwarded between two links outside, and nothing
// that has to do with a bridge, unless that bridge is the host's way out.
func TestReachGuard(t *testing.T) {
	for _, bridgeNF := range []bool{true, false} {
		t.Run(fmt.Sprintf("brnf=%t", bridgeNF), func(t *testing.T) {
			w := newWorld(t, bridgeNF)
			w.bridge("br0", 150)
			w.container("u1", "br0", 150, 2)
			w.container("u2", "br0", 150, 3)
			others := []probe{
				{"e1", "out:8080", "out:8080 e1"}, {"out", "e1:8080", "e1:8080 out"},
				{"a1", "out:8080", "out:8080"}, {"u1", "u2:8080", "u2:8080 u1"},
			}
			open := append([]probe{{"out", "far:8080", "far:8080 out"}, {"u1", "out:8080", "out:8080 u1"}}, others...)
			closed := append([]probe{{"out", "far:8080", ""}, {"u1", "out:8080", "out:8080 u1"}}, others...)
			uplink := append([]probe{{"out", "far:8080", ""}, {"u1", "out:8080", ""}, {"out", "u1:8080", ""}}, others...)
			steps := []struct {
				v4, v6 bool
				lifted bool // IPv6
				links  []string
				want   [2][]probe
			}{
				{false, false, false, nil, [2][]probe{open, open}},
				{true, false, false, nil, [2][]probe{closed, open}},
				{true, true, false, []string{"br0"}, [2][]probe{uplink, uplink}},
				{false, true, false, nil, [2][]probe{open, closed}},
				{true, true, true, nil, [2][]probe{closed, open}},
			}
			if _, err := w.fw.add(t.Context(), w.elements()); err != nil {
				t.Fatal(err)
			}
			for i, s := range steps {
				if err := errors.Join(w.fw.setFamilies(t.Context(), setGuard, s.v4, s.v6), w.fw.setFamilies(t.Context(), setLifted, false, s.lifted)); err != nil {
					t.Fatal(err)
				}
				if err := w.fw.setUplinks(t.Context(), s.links); err != nil {
					t.Fatal(err)
				}
				for family, want := range s.want {
					w.run(family, want)
				}
				if t.Failed() {
					t.Fatalf("in step %d", i)
				}
			}
		})
	}
}

// An endpoint on a bridge that is not ours, with the host's FORWARD closed.
func TestReachAttached(t *testing.T) {
	for _, bridgeNF := range []bool{true, false} {
		t.Run(fmt.Sprintf("brnf=%t", bridgeNF), func(t *testing.T) {
			w := newWorld(t, bridgeNF)
			w.engine("nft")
			w.bridge("br0", 150)
			w.container("u1", "br0", 150, 2) // ours
			w.container("u2", "br0", 150, 3)
			w.container("u3", "br0", 150, 4)
			w.bridge("br1", 151)
			w.container("x1", "br1", 151, 2)
			els := append(w.elements(), w.published(anyHost, 150, "u1", 8080)...)
			for i, p := range subnet(150, 0) {
				els = append(els,
					Element{Set: SetAttached, Link: "br0", Net: hostPrefix(w.addr["u1"][i])},
					Element{Set: SetMasquerade, Net: p.Masked()},
					Element{Set: SetHome, Net: p.Masked(), Link: "br0"})
			}
			if _, err := w.fw.add(t.Context(), els); err != nil {
				t.Fatal(err)
			}
			if err := w.fw.setUplinks(t.Context(), []string{"br0", "wfb"}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.hook.ensure(t.Context()); err != nil {
				t.Fatal(err)
			}
			for family := range 2 {
				between := "u3:8080 u2"
				if bridgeNF {
					between = "" // dropped by FORWARD, and not ours to accept
				}
				w.run(family, []probe{
					{"u1", "u2:8080", "u2:8080 u1"},
					{"u2", "u1:8080", "u1:8080 u2"},
					{"u2", "u3:8080", between},
					{"u1", "out:8080", "out:8080 gw200"},
					{"out", "u1:8080", "u1:8080 out"},
					{"out", "u2:8080", ""},
					{"out", "host:150", "u1:8080 gw150"},
					{"a1", "u2:8080", "u2:8080 gw150"}, // any other network of ours
					{"a1", "host:150", "u1:8080 gw150"},
					{"u2", "host:150", "u1:8080 gw150"},
					{"u1", "host:80", "a1:8080 u1"},
					{"u1", "a1:8080", ""},
					{"x1", "host:80", "a1:8080 x1"}, // nobody but us lets the answers pass
					{"b1", "o1:8080", "o1:8080 b1"}, // open to everybody
					{"host", "host:150", "u1:8080 gw150"},
				})
			}
		})
	}
}

// What conntrack cannot place is not translated, so it must not leave from
// where it should have been.
func TestReachUntranslated(t *testing.T) {
	w := newWorld(t, true)
	if _, err := w.fw.add(t.Context(), w.elements()); err != nil {
		t.Fatal(err)
	}
	for family, network := range []string{"ip4:tcp", "ip6:tcp"} {
		var at *net.IPConn
		w.ns["out"].Do(func() {
			var err error
			if at, err = net.ListenIP(network, nil); err != nil {
				t.Fatal(err)
			}
		})
		for _, from := range []string{"a1", "r1"} { // in this order: r1 shows that the first would be here by now
			w.ns[from].Do(func() {
				c, err := net.DialIP(network, nil, &net.IPAddr{IP: w.addr["out"][family].AsSlice()})
				if err != nil {
					t.Fatal(err)
				}
				// A TCP header without its checksum.
				_, _ = c.Write([]byte{1, 2, 3, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 4, 1, 0, 0, 0, 0, 0})
				_ = c.Close()
			})
		}
		_ = at.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, a, err := at.ReadFrom(make([]byte, 100))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := a.String(), w.addr["r1"][family].String(); got != want {
			t.Errorf("a packet came from %s, want the first one from %s", got, want)
		}
		_ = at.Close()
	}
}

// TestReachLAN: a container on the LAN that the host has access to. Containers on
// bridges, the engine's too, reach it by the address of the host's own
// sub-interface, so that the answers pass what the engine, from version 28 on, drops
// before connections are tracked. To them leads what is published.
func TestReachLAN(t *testing.T) {
	w := newWorld(t, true)
	w.engine("nft")
	w.neighbour("l1", "wfs1", 152)
	for i, ipt := range []string{"iptables-nft", "ip6tables-nft"} {
		w.host.Exec(ipt, "-t", "raw", "-A", "PREROUTING", "-d", w.addr["e1"][i].String(), "!", "-i", "docker0", "-j", "DROP")
	}
	els := append(w.elements(), Element{Set: SetOwn, Link: "wfs1"})
	for i, p := range subnet(200, 1) { // an address of the host by another card
		l1 := w.addr["l1"][i]
		els = append(els, Element{Set: SetAttached, Link: "wfs1", Net: hostPrefix(l1)},
			Element{Set: SetNear, Net: hostPrefix(p.Addr()), To: l1})
		w.host.Exec("ip", "route", "replace", l1.String(), "dev", "wfs1", "src", p.Addr().String())
	}
	if _, err := w.fw.add(t.Context(), els); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	probes := []probe{
		{"host", "l1:8080", "l1:8080 gw200"},
		{"e1", "l1:8080", "l1:8080 gw152"},
		{"a1", "l1:8080", "l1:8080 gw152"},
		{"l1", "e1:8081", ""},
		{"l1", "host:94", "e1:8080 l1"},
		{"l1", "a1:8080", ""},
		{"out", "l1:8080", "l1:8080 gw152"},
		{"out", "e1:8080", ""},
		{"n1", "l1:8080", ""},
	}
	for family := range 2 {
		w.run(family, probes)
	}
	// As engines up to 27 have it.
	w.host.Exec("sh", "-ec", "iptables-nft -t raw -F PREROUTING; ip6tables-nft -t raw -F PREROUTING")
	for family := range 2 {
		w.run(family, probes[:6])
	}
}

// A link-local address of the host is nobody's to translate: the proxy behind the
// held port serves it.
func TestReachLinkLocal(t *testing.T) {
	w := newWorld(t, true)
	w.serve("host", 80)
	if _, err := w.fw.add(t.Context(), w.elements()); err != nil {
		t.Fatal(err)
	}
	for from, link := range map[string]string{"out": "eth0", "a2": "wfa", "host": "eth0"} {
		// By its number: the name's, which net remembers, is another namespace's.
		zone, _, _ := strings.Cut(w.ns[from].Exec("ip", "-o", "link", "show", "eth0"), ":")
		to := netip.AddrPortFrom(linkLocal(t, w, link).WithZone(zone), 80)
		if got := w.ask(from, "tcp", to, 5*time.Second); !strings.HasPrefix(got, "host 80 ") {
			t.Errorf("from %s to %s: %q answers, want the host", from, to, got)
		}
	}
}

// linkLocal is the address that the kernel gave to a link of the host.
func linkLocal(t *testing.T, w *world, link string) (a netip.Addr) {
	t.Helper()
	w.host.Do(func() {
		i, err := net.InterfaceByName(link)
		if err != nil {
			t.Fatal(err)
		}
		list, err := i.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range list {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
				a = p.Addr()
			}
		}
	})
	if !a.IsValid() {
		t.Fatalf("%s has no link-local address", link)
	}
	return a
}
