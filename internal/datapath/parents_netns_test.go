package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/internal/netnstest"
)

// lanWorld is a host with a card on a LAN, and a station of that LAN.
func lanWorld(t *testing.T) (k *Kernel, host, station *netnstest.NS) {
	t.Helper()
	k, host = newKernel(t)
	station = netnstest.New(t)
	host.Exec("sh", "-ec", `
		ip link set lo up
		ip link add lan0 type veth peer name far
		ip addr add 192.0.2.10/24 dev lan0
		ip addr add 2001:db8:1::10/64 dev lan0 nodad
		ip link set lan0 up`)
	station.Take("far", "eth0", prefix("192.0.2.50/24"), prefix("2001:db8:1::50/64"))
	return k, host, station
}

func lanAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// lanNetwork is a macvlan network that the host has access to, with one
// container.
func lanNetwork() State {
	return State{
		Parents: []Parent{{Name: "lan0", Existing: true}},
		Children: []Child{
			{Name: "wfsnet", Parent: "lan0", Kind: "macvlan", Mode: "bridge", MTU: 1500, MAC: MAC{2, 0, 0, 0, 9, 9}, Stays: true,
				Addrs: []netip.Prefix{prefix("169.254.7.7/32"), prefix("fd77::7/128")}},
			{Name: "wfa", Parent: "lan0", Kind: "macvlan", Mode: "bridge", MTU: 1500, MAC: mac(5)},
		},
		Routes: []Route{
			{Link: "wfsnet", To: lanAddr("192.0.2.5"), MAC: mac(5), From: "lan0"},
			{Link: "wfsnet", To: lanAddr("2001:db8:1::5"), MAC: mac(5), From: "lan0"},
		},
		Elements: []Element{{Set: SetOwn, Link: "wfsnet"}, {Set: SetAttached, Link: "wfsnet", Net: prefix("192.0.2.5/32")},
			{Set: SetNear, Net: prefix("192.0.2.10/32"), To: lanAddr("192.0.2.5")},
			{Set: SetNear, Net: prefix("2001:db8:1::10/128"), To: lanAddr("2001:db8:1::5")}},
	}
}

func TestLANMacvlanEnsureOwnedRemove(t *testing.T) {
	k, host, _ := lanWorld(t)
	s := lanNetwork()
	if lines := ensure(t, k, s); len(lines) == 0 {
		t.Error("making everything changed nothing")
	}
	want := s
	want.Parents = nil // not ours
	same(t, k, want)
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("the second time changed %q", lines)
	}
	for addr, src := range map[string]string{"192.0.2.5": "192.0.2.10", "2001:db8:1::5": "2001:db8:1::10"} {
		if got := host.Exec("ip", "route", "get", addr); !strings.Contains(got, "dev wfsnet") || !strings.Contains(got, "src "+src) {
			t.Errorf("to %s: %s", addr, got)
		}
	}
	remove(t, k, s)
	same(t, k, State{})
	remove(t, k, s)
	if got := host.Exec("ip", "route", "get", "192.0.2.5"); !strings.Contains(got, "dev lan0") {
		t.Errorf("the route is left: %s", got)
	}
}

func TestLANMacvlanMends(t *testing.T) {
	for name, damage := range map[string]string{
		"gone":          "ip link del wfsnet",
		"down":          "ip link set wfsnet down",
		"address":       "ip addr del 169.254.7.7/32 dev wfsnet",
		"surplus":       "ip addr add 192.0.2.99/32 dev wfsnet",
		"route":         "ip route del 192.0.2.5",
		"route, IPv6":   "ip route del 2001:db8:1::5",
		"neighbour":     "ip neigh del 192.0.2.5 dev wfsnet",
		"mode":          "ip link set wfsnet type macvlan mode private",
		"hardware":      "ip link set wfsnet address 02:00:00:00:00:77",
		"host's source": "ip addr del 192.0.2.10/24 dev lan0; ip addr add 192.0.2.11/24 dev lan0",
	} {
		t.Run(name, func(t *testing.T) {
			k, host, _ := lanWorld(t)
			s := lanNetwork()
			ensure(t, k, s)
			host.Exec("sh", "-ec", damage)
			want := s
			want.Parents = nil
			if want.Minus(owned(t, k)).Empty() && owned(t, k).Minus(want).Empty() {
				t.Error("Owned does not show the damage")
			}
			if lines := ensure(t, k, s); len(lines) == 0 {
				t.Error("nothing mended")
			}
			same(t, k, want)
			if lines := ensure(t, k, s); len(lines) != 0 {
				t.Errorf("mended again: %q", lines)
			}
		})
	}
}

// TestMacvlanAccess: host and container reach each other by their own
// addresses, and nobody of the LAN hears a second hardware address for the host.
func TestLANMacvlanAccess(t *testing.T) {
	k, host, lan := lanWorld(t)
	ensure(t, k, lanNetwork())
	c := netnstest.New(t)
	c.Take("wfa", "eth0", prefix("192.0.2.5/24"), prefix("2001:db8:1::5/64"))
	c.Exec("sh", "-ec", `
		ip route add 169.254.7.7/32 dev eth0; ip route add fd77::7/128 dev eth0
		ip route add 192.0.2.10/32 via 169.254.7.7; ip route add 2001:db8:1::10/128 via fd77::7`)
	heard := filepath.Join(t.TempDir(), "heard")
	listener := lan.Start("sh", "-c", "exec tcpdump -l -n -i eth0 'arp[6:2] = 2' >"+heard+" 2>&1")
	for stop := time.Now().Add(5 * time.Second); !strings.Contains(read(t, heard), "listening"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(stop) {
			t.Fatal("tcpdump does not listen: ", read(t, heard))
		}
	}
	for _, p := range []struct {
		from *netnstest.NS
		to   string
	}{
		{host, "192.0.2.5"}, {host, "2001:db8:1::5"}, {c, "192.0.2.10"}, {c, "2001:db8:1::10"},
		{lan, "192.0.2.5"}, {lan, "192.0.2.10"}, {c, "192.0.2.50"}, {lan, "2001:db8:1::10"}, {c, "2001:db8:1::50"},
	} {
		if out, err := p.from.Output("busybox", "ping", "-c", "1", "-W", "2", p.to); err != nil {
			t.Errorf("ping %s: %v\n%s", p.to, err, out)
		}
	}
	own := strings.Fields(host.Exec("ip", "-br", "link", "show", "lan0"))[2]
	// A second answer would come later and so be ignored by this station, not by
	// every switch.
	time.Sleep(200 * time.Millisecond)
	_ = listener.Process.Signal(os.Interrupt)
	_ = listener.Wait()
	answers := 0
	for line := range strings.Lines(read(t, heard)) {
		if _, mac, ok := strings.Cut(line, "Reply 192.0.2.10 is-at "); ok {
			answers++
			if !strings.HasPrefix(mac, own) {
				t.Errorf("the LAN hears %s", line)
			}
		}
	}
	if answers == 0 {
		t.Errorf("nobody answered for the host: %s", read(t, heard))
	}
	for _, a := range []string{"192.0.2.10", "2001:db8:1::10"} {
		if got := lan.Exec("ip", "neigh", "show", a); !strings.Contains(got, own) {
			t.Errorf("the LAN knows %s as %s, want %s", a, got, own)
		}
	}
}

// read returns a file's content, "" while it is not there.
func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

func TestLink(t *testing.T) {
	k, host, _ := lanWorld(t)
	host.Exec("sh", "-ec", "ip link add br0 type bridge; ip link add p0 type veth peer name p1; ip link set p0 master br0; sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.lan0.rp_filter=0 net.ipv4.conf.p0.rp_filter=1")
	f, ok, err := k.Link(t.Context(), "lan0")
	if err != nil || !ok || !f.Up || f.Ours || f.Strict || f.MTU != 1500 || f.Master != "" || len(f.Addrs) != 2 {
		t.Errorf("lan0: %+v, %t, %v", f, ok, err)
	}
	f, ok, err = k.Link(t.Context(), "p0")
	if err != nil || !ok || f.Up || !f.Strict || f.Master != "br0" || f.Kind != "veth" {
		t.Errorf("p0: %+v, %t, %v", f, ok, err)
	}
	if f, ok, err := k.Link(t.Context(), "none"); ok || err != nil {
		t.Errorf("none: %+v, %t, %v", f, ok, err)
	}
}

// TestHostOnLAN is what a new network asks of the host: who it sends to by a link,
// and what it is in.
func TestHostOnLAN(t *testing.T) {
	k, host, _ := lanWorld(t)
	host.Exec("sh", "-ec", `
		ip link add other type veth peer name otherp; ip link set other up; ip link set otherp up
		ip addr add 198.51.100.1/24 dev other; ip addr add 203.0.113.7/32 dev other
		ip route add default via 192.0.2.50 metric 20; ip route add default via 192.0.2.51 metric 10
		ip route add default via 198.51.100.9 metric 5; ip route add 10.0.0.0/8 via 192.0.2.52
		ip -6 route add default via 2001:db8:1::50 dev lan0`)
	ensure(t, k, State{Bridges: []Bridge{{Name: "wfb1", MTU: 1500, MAC: MAC{2, 1}, Addrs: []netip.Prefix{prefix("10.9.0.1/24")}}}})
	for link, want := range map[string]string{
		"lan0": "[192.0.2.51 192.0.2.50 2001:db8:1::50]", "other": "[198.51.100.9]", "none": "[]", "lo": "[]",
	} {
		if got, err := k.Routers(t.Context(), link); err != nil || fmt.Sprint(got) != want {
			t.Errorf("routers by %s: %v, %v, want %s", link, got, err, want)
		}
	}
	got, err := k.Addressed(t.Context())
	if err != nil || fmt.Sprint(got["lan0"]) != "[192.0.2.10/24 2001:db8:1::10/64]" || fmt.Sprint(got["other"]) != "[198.51.100.1/24 203.0.113.7/32]" || got["wfb1"] != nil {
		t.Errorf("addressed: %v, %v", got, err)
	}
}

// Cancelled at any step, Ensure leaves nothing and the next call succeeds; and
// whatever object cannot be made, nothing is left of the others.
func TestLANMacvlanFailingLeavesNothing(t *testing.T) {
	k, _, _ := lanWorld(t)
	s := lanNetwork()
	want := s
	want.Parents = nil
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
	same(t, k, want)
	remove(t, k, s)
	for name, spoil := range map[string]struct {
		how  string
		f    func(*State)
		word string
	}{
		"parent":       {how: "ip link del lan0", word: "lan0"},
		"parent taken": {how: "ip link add br0 type bridge; ip link set lan0 master br0", word: "use"},
		"own":          {how: "ip link add wfsnet type bridge", word: "wfsnet"},
		"own address":  {f: func(s *State) { s.Children[0].Addrs = append(s.Children[0].Addrs, prefix("ff02::1/64")) }, word: "ff02::1"},
		"child":        {how: "ip link add wfa type bridge", word: "wfa"},
		"child's MTU":  {f: func(s *State) { s.Children[1].MTU = 9000 }, word: "macvlan"},
		"route":        {f: func(s *State) { s.Routes[1].Link = "none" }, word: "none"},
		"element":      {f: func(s *State) { s.Elements = append(s.Elements, Element{Set: "nosuch"}) }, word: "nosuch"},
	} {
		t.Run(name, func(t *testing.T) {
			k, host, _ := lanWorld(t)
			s := lanNetwork()
			if spoil.f != nil {
				spoil.f(&s)
			} else {
				host.Exec("sh", "-ec", spoil.how)
			}
			_, err := k.Ensure(t.Context(), s)
			wantError(t, err, spoil.word)
			same(t, k, State{})
		})
	}
}

// TestLANParentDown: what hangs on a card that is down works once it is up.
func TestLANParentDown(t *testing.T) {
	k, host, station := lanWorld(t)
	host.Exec("ip", "link", "set", "lan0", "down")
	s := lanNetwork()
	ensure(t, k, s)
	box := netnstest.New(t)
	box.Take("wfa", "eth0", prefix("192.0.2.5/24"), prefix("2001:db8:1::5/64"))
	box.Exec("sh", "-ec", "ip route add 169.254.7.7 dev eth0; ip route add 192.0.2.10 via 169.254.7.7") // as Join answers
	host.Exec("ip", "link", "set", "lan0", "up")
	if lines := ensure(t, k, State{Parents: s.Parents, Children: s.Children[:1], Routes: s.Routes}); len(lines) != 0 {
		t.Errorf("to be mended when the card is up: %q", lines)
	}
	for name, from := range map[string]*netnstest.NS{"the host": host, "a station": station} {
		from.Do(func() {
			c, err := net.DialTimeout("tcp", "192.0.2.5:9", 5*time.Second)
			if err == nil {
				_ = c.Close()
			}
			if !errors.Is(err, unix.ECONNREFUSED) { // by the container, which listens nowhere
				t.Errorf("%s does not reach it: %v", name, err)
			}
		})
	}
}

// TestLANAnnounce: a station that knows another one under the address learns the
// new one at once, and so does the host.
func TestLANAnnounce(t *testing.T) {
	k, host, lan := lanWorld(t)
	own := strings.Fields(host.Exec("ip", "-br", "link", "show", "lan0"))[2]
	for _, a := range []string{"192.0.2.5", "2001:db8:1::5"} {
		for _, c := range []struct {
			mac  MAC
			want string
		}{{mac(5), mac(5).String()}, {MAC{}, own}} {
			lan.Exec("ip", "neigh", "replace", a, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "stale")
			host.Exec("ip", "neigh", "replace", a, "lladdr", "02:00:00:00:00:99", "dev", "lan0", "nud", "reachable")
			if err := k.Announce("lan0", lanAddr(a), c.mac); err != nil {
				t.Fatal(err)
			}
			got := ""
			for stop := time.Now().Add(2 * time.Second); time.Now().Before(stop) && !strings.Contains(got, c.want); time.Sleep(5 * time.Millisecond) {
				got = lan.Exec("ip", "neigh", "show", a)
			}
			if !strings.Contains(got, c.want) {
				t.Errorf("%s is known as %s, want %s", a, got, c.want)
			}
			if got := host.Exec("ip", "neigh", "show", a); !strings.Contains(got, c.want) {
				t.Errorf("the host knows %s as %s, want %s", a, got, c.want)
			}
		}
		// What somebody set for good stays, and the host learns of nobody it never met.
		host.Exec("ip", "neigh", "replace", a, "lladdr", "02:00:00:00:00:99", "dev", "lan0", "nud", "permanent")
		if err := k.Announce("lan0", lanAddr(a), mac(5)); err != nil {
			t.Fatal(err)
		}
		if got := host.Exec("ip", "neigh", "show", a); !strings.Contains(got, "02:00:00:00:00:99") {
			t.Errorf("the permanent entry of %s is now %s", a, got)
		}
		host.Exec("ip", "neigh", "del", a, "dev", "lan0")
		if err := k.Announce("lan0", lanAddr(a), mac(5)); err != nil {
			t.Fatal(err)
		}
		if got := host.Exec("ip", "neigh", "show", a); strings.Contains(got, "lladdr") {
			t.Errorf("the host has an entry for %s that it did not ask for: %s", a, got)
		}
	}
	wantError(t, k.Announce("none", lanAddr("192.0.2.5"), mac(5)), "none", "does not exist")
}

// What hangs on a link is seen in containers too, and asking leaves nothing behind.
func TestLinkCarries(t *testing.T) {
	k, host, _ := lanWorld(t)
	lan, err := k.links.change.get("lan0")
	if err != nil {
		t.Fatal(err)
	}
	carries := func(when string, want bool) {
		t.Helper()
		before := host.Exec("ip", "-d", "link", "show", "lan0")
		got, err := k.links.carries(t.Context(), lan.index)
		if err != nil || got != want {
			t.Errorf("%s: carries %v, %v", when, got, err)
		}
		if after := host.Exec("ip", "-d", "link", "show", "lan0"); after != before {
			t.Errorf("%s: lan0 was changed from %s to %s", when, before, after)
		}
		if out := host.Exec("ip", "-br", "link"); strings.Contains(out, "wft") {
			t.Errorf("%s: left behind: %s", when, out)
		}
	}
	carries("alone", false)
	for _, mode := range []string{"bridge", "private", "vepa", "passthru"} {
		host.Exec("ip", "link", "add", "link", "lan0", "name", "mv0", "type", "macvlan", "mode", mode)
		carries(mode, true)
		container := netnstest.New(t)
		container.Take("mv0", "eth0", prefix("192.0.2.77/24"))
		carries(mode+" in a container", true)
		container.Exec("ip", "link", "del", "eth0")
		carries(mode+" gone", false)
	}
	host.Exec("ip", "link", "add", "link", "lan0", "name", fmt.Sprintf("wft%d", lan.index), "group", fmt.Sprint(Group), "type", "macvlan", "mode", "passthru")
	carries("interrupted before", false)
}
