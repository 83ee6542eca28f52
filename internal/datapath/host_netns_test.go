package datapath

import (
	"net/netip"
	"testing"
)

func TestUnderlay(t *testing.T) {
	k, host := newKernel(t)
	check := func(want string, addr, link string, mtu int) {
		t.Helper()
		got, err := k.Underlay(t.Context(), want)
		if err != nil || got != (Underlay{Addr: lanAddr(addr), Link: link, MTU: mtu}) {
			t.Errorf("underlay %q: %v, %v, want %s on %s, MTU %d", want, got, err, addr, link, mtu)
		}
	}
	refuse := func(want string, words ...string) {
		t.Helper()
		_, err := k.Underlay(t.Context(), want)
		wantError(t, err, words...)
	}
	refuse("", "no default route", "none with an address")
	host.Exec("sh", "-ec", `
		ip link set lo up
		for i in 1 2 3 4; do ip link add l$i type veth peer name p$i; ip link set p$i up; ip link set l$i up; done
		ip link set l1 mtu 1400; ip link set l2 mtu 9000
		ip addr add 192.0.1.5/24 dev l1; ip addr add 192.0.1.6/24 dev l1; ip addr add 198.51.100.6/24 dev l1
		ip addr add 192.0.2.5/24 dev l2; ip addr add 2001:db8:2::5/64 dev l2 nodad
		ip addr add 2001:db8:3::9/64 dev l3 nodad preferred_lft 0; ip addr add 2001:db8:3::5/64 dev l3 nodad
		ip link set p4 down
		ip -6 route add default via 2001:db8:2::1 metric 1`)
	check("", "2001:db8:2::5", "l2", 9000)
	host.Exec("ip", "route", "add", "default", "via", "192.0.1.1", "metric", "200")
	check("", "192.0.1.5", "l1", 1400)
	host.Exec("ip", "route", "replace", "default", "via", "192.0.1.1", "metric", "200", "src", "198.51.100.6")
	check("", "198.51.100.6", "l1", 1400)
	host.Exec("ip", "route", "add", "default", "via", "192.0.2.1", "metric", "100")
	check("", "192.0.2.5", "l2", 9000)
	host.Exec("sh", "-ec", "ip route flush default; ip route add default nexthop via 192.0.1.1 nexthop via 192.0.2.1")
	check("", "192.0.1.5", "l1", 1400)
	check("l2", "192.0.2.5", "l2", 9000)
	check("l3", "2001:db8:3::5", "l3", 1500)
	check("192.0.1.6", "192.0.1.6", "l1", 1400)
	check("::ffff:192.0.1.6", "192.0.1.6", "l1", 1400)
	check("2001:db8:3::9", "2001:db8:3::9", "l3", 1500)
	toward := func(peer, addr, link string, mtu int) {
		t.Helper()
		got, err := k.Underlay(t.Context(), "", lanAddr("203.0.113.77"), lanAddr("192.0.2.5"), lanAddr(peer))
		if err != nil || got != (Underlay{Addr: lanAddr(addr), Link: link, MTU: mtu}) {
			t.Errorf("underlay toward %s: %v, %v, want %s on %s", peer, got, err, addr, link)
		}
	}
	host.Exec("sh", "-ec", "ip route flush default; ip -6 route flush default")
	toward("192.0.2.9", "192.0.2.5", "l2", 9000)
	toward("198.51.100.9", "198.51.100.6", "l1", 1400)
	toward("2001:db8:3::1", "2001:db8:3::5", "l3", 1500)
	host.Exec("ip", "route", "add", "203.0.113.128/25", "via", "192.0.1.1")
	toward("203.0.113.200", "192.0.1.5", "l1", 1400)
	host.Exec("ip", "route", "add", "default", "via", "192.0.1.1")
	if got, err := k.Underlay(t.Context(), "", lanAddr("192.0.2.9")); err != nil || got.Link != "l2" {
		t.Errorf("a peer beside the default route: %v, %v", got, err)
	}
	refuse("l9", "l9", "no such interface", "l1 (192.0.1.5)", "l3 (2001:db8:3::5)")
	refuse("l4", "l4", "no address", "l1 (192.0.1.5)")
	refuse("192.0.2.99", "192.0.2.99", "does not have", "l2 (192.0.2.5)")
	for _, a := range []string{"127.0.0.1", "::1", "0.0.0.0", "239.1.1.1", "fe80::1", "fe80::1%l1"} {
		refuse(a, a, "reach")
	}
	host.Exec("ip", "link", "set", "l1", "down")
	refuse("l1", "l1", "down", "ip link set l1 up")
	refuse("192.0.1.6", "l1", "down")
	ensure(t, k, State{Bridges: []Bridge{{Name: "wfb0", MTU: 1500, Addrs: []netip.Prefix{prefix("10.7.0.1/24")}}}})
	refuse("wfb0", "wfb0", "this plugin", "l2 (192.0.2.5)")
}
