package datapath

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/netnstest"
)

// These need kinds of links that many kernels lack, and run in make vm.

func TestLANVLANs(t *testing.T) {
	netnstest.Needs(t, "vlan")
	k, host, _ := lanWorld(t)
	host.Exec("sh", "-ec", "ip link add link lan0 name lan0.5 type vlan id 5; ip link set lan0.5 up")
	s := State{Parents: []Parent{
		{Name: "lan0", Existing: true},
		{Name: "lan0.10", Lower: "lan0", VLAN: 10},
		{Name: "lan0.10.20", Lower: "lan0.10", VLAN: 20},
	}, Children: []Child{{Name: "wfa", Parent: "lan0.10.20", Kind: "macvlan", Mode: "bridge", MAC: mac(5)}}}
	want := s
	want.Parents = s.Parents[1:]
	ensure(t, k, s)
	same(t, k, want)
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("the second time changed %q", lines)
	}
	for _, damage := range []string{
		"ip link set lan0.10.20 down", "ip link del lan0.10.20", "ip link del lan0.10",
		"ip link set lan0 mtu 1300; ip link set lan0 mtu 1500", // the kernel takes them along down, not up
	} {
		host.Exec("sh", "-ec", damage)
		if want.Minus(owned(t, k)).Empty() && owned(t, k).Minus(want).Empty() {
			t.Errorf("%s: Owned does not show it", damage)
		}
		ensure(t, k, s)
		same(t, k, want)
		for _, link := range []string{"lan0.10", "lan0.10.20"} {
			if got := mtuOf(host, link); got != "1500" {
				t.Errorf("%s: MTU of %s is %s", damage, link, got)
			}
		}
	}
	_, err := k.Ensure(t.Context(), State{Parents: []Parent{{Name: "lan0.x", Lower: "lan0", VLAN: 5}}})
	wantError(t, err, "lan0.x", "VLAN ID 5")
	_, err = k.Ensure(t.Context(), State{Parents: []Parent{{Name: "lan0.5", Lower: "lan0", VLAN: 5}}})
	wantError(t, err, "lan0.5", "not ours")
	remove(t, k, s)
	same(t, k, State{})
	if got := host.Exec("ip", "-br", "link"); !strings.Contains(got, "lan0.5@lan0") || strings.Contains(got, "lan0.10") {
		t.Errorf("left: %s", got)
	}
}

func TestLANDummy(t *testing.T) {
	netnstest.Needs(t, "dummy")
	k, _, _ := lanWorld(t)
	s := State{Parents: []Parent{{Name: "wfdnet"}}, Children: []Child{{Name: "wfa", Parent: "wfdnet", Kind: "macvlan", Mode: "bridge", MAC: mac(5)}}}
	ensure(t, k, s)
	same(t, k, s)
	remove(t, k, s)
	same(t, k, State{})
}

// ipvlanNetwork is lanNetwork with ipvlan.
func ipvlanNetwork(mode string) State {
	s := lanNetwork()
	for i := range s.Children {
		c := &s.Children[i]
		c.Kind, c.Mode, c.Flag, c.MAC = "ipvlan", mode, "bridge", MAC{}
	}
	for i := range s.Routes {
		s.Routes[i].MAC = MAC{}
	}
	return s
}

// TestLANIPvlanAccess: host and container reach each other by their own
// addresses, in every mode.
func TestLANIPvlanAccess(t *testing.T) {
	netnstest.Needs(t, "ipvlan")
	for _, mode := range []string{"l2", "l3", "l3s"} {
		t.Run(mode, func(t *testing.T) {
			k, host, lan := lanWorld(t)
			s := ipvlanNetwork(mode)
			addrs := []netip.Prefix{prefix("192.0.2.5/24"), prefix("2001:db8:1::5/64")}
			routes := "ip route add 192.0.2.10/32 via 169.254.7.7; ip route add 2001:db8:1::10/128 via fd77::7"
			if mode != "l2" {
				// Its subnet is not the LAN's, which reaches it by the host.
				text := func(a netip.Addr) netip.Addr {
					return lanAddr(strings.NewReplacer("192.0.2.5", "10.5.0.5", "2001:db8:1::5", "fd05::5").Replace(a.String()))
				}
				for i := range s.Routes {
					s.Routes[i].To = text(s.Routes[i].To)
				}
				s.Elements = nil
				addrs = []netip.Prefix{prefix("10.5.0.5/24"), prefix("fd05::5/64")}
				routes = "ip route add default dev eth0; ip -6 route add default dev eth0"
				lan.Exec("sh", "-ec", "ip route add 10.5.0.0/24 via 192.0.2.10; ip route add fd05::/64 via 2001:db8:1::10")
			}
			ensure(t, k, s)
			want := s
			want.Parents = nil
			same(t, k, want)
			if lines := ensure(t, k, s); len(lines) != 0 {
				t.Errorf("the second time changed %q", lines)
			}
			c := netnstest.New(t)
			c.Take("wfa", "eth0", addrs...)
			c.Exec("sh", "-ec", fmt.Sprintf("ip route add 169.254.7.7/32 dev eth0; ip route add fd77::7/128 dev eth0; %s", routes))
			for _, p := range []struct {
				from *netnstest.NS
				to   string
			}{
				{host, addrs[0].Addr().String()}, {host, addrs[1].Addr().String()}, {c, "192.0.2.10"}, {c, "2001:db8:1::10"},
				{c, "192.0.2.50"}, {c, "2001:db8:1::50"}, {lan, addrs[0].Addr().String()}, {lan, "192.0.2.10"},
			} {
				if out, err := p.from.Output("busybox", "ping", "-c", "1", "-W", "3", p.to); err != nil {
					t.Errorf("ping %s: %v\n%s", p.to, err, out)
				}
			}
			remove(t, k, s)
		})
	}
}

// TestLANKindsExclude: what the kernel refuses on a parent is told in words.
func TestLANKindsExclude(t *testing.T) {
	netnstest.Needs(t, "ipvlan")
	k, host, _ := lanWorld(t)
	host.Exec("sh", "-ec", "ip link add br0 type bridge; ip link add p0 type veth peer name p1; ip link set p0 master br0")
	ensure(t, k, State{Children: []Child{{Name: "wfa", Parent: "lan0", Kind: "macvlan", Mode: "bridge", MAC: mac(5)}}})
	_, err := k.Ensure(t.Context(), State{Children: []Child{{Name: "wfb", Parent: "lan0", Kind: "ipvlan", Mode: "l2", Flag: "bridge"}}})
	wantError(t, err, "lan0", "ipvlan")
	_, err = k.Ensure(t.Context(), State{Children: []Child{{Name: "wfb", Parent: "p0", Kind: "ipvlan", Mode: "l2", Flag: "bridge"}}})
	wantError(t, err, "p0", "bridge")
	_, err = k.Ensure(t.Context(), State{Children: []Child{{Name: "wfb", Parent: "lan0", Kind: "macvlan", Mode: "passthru"}}})
	wantError(t, err, "lan0", "passthru")
}

// A VLAN that one instance made stays as long as something of others is on it: it is
// the host's then.
func TestLANVLANOfAnother(t *testing.T) {
	netnstest.Needs(t, "vlan")
	for _, kind := range []string{"macvlan", "ipvlan", "vlan"} {
		t.Run(kind, func(t *testing.T) {
			netnstest.Needs(t, kind)
			one, host, _ := lanWorld(t)
			two := second(t, "other")
			made := State{Parents: []Parent{{Name: "lan0.42", Lower: "lan0", VLAN: 42}}}
			ensure(t, one, made)
			theirs := State{Parents: []Parent{{Name: "lan0.42", Existing: true}}}
			switch kind {
			case "macvlan":
				theirs.Children = []Child{{Name: "wfa", Parent: "lan0.42", Kind: kind, Mode: "bridge", MAC: mac(5)}}
			case "ipvlan":
				theirs.Children = []Child{{Name: "wfa", Parent: "lan0.42", Kind: kind, Mode: "l2", Flag: "bridge"}}
			case "vlan":
				theirs.Parents = append(theirs.Parents, Parent{Name: "lan0.42.7", Lower: "lan0.42", VLAN: 7})
			}
			ensure(t, two, theirs)
			if kind != "vlan" {
				netnstest.New(t).Take("wfa", "eth0", prefix("10.42.0.2/24"))
			}
			remove(t, one, made)
			same(t, one, State{})
			if out := host.Exec("ip", "-br", "link", "show", "lan0.42"); !strings.Contains(out, "lan0.42@lan0") {
				t.Errorf("gone: %s", out)
			}
			if lines := ensure(t, two, theirs); kind == "vlan" && len(lines) != 0 {
				t.Errorf("the other had to make %q", lines)
			}
			remove(t, two, theirs)
		})
	}
}
