package datapath

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestFlowsBeside: a LAN that a container joins takes from it the flows of that LAN's
// clients that its published ports translate, and no other.
func TestFlowsBeside(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", "ip link add lan type veth peer name lan2; ip link set lan2 up; ip addr add 192.0.2.1/24 dev lan; ip addr add fd99::1/64 dev lan nodad; ip link set lan up")
	s := State{Elements: []Element{
		{Set: SetBeside, Net: prefix("192.0.2.0/24"), To: lanAddr("10.7.0.2")},
		{Set: SetBeside, Net: prefix("fd99::/64"), To: lanAddr("fd07::2")},
	}}
	for i, f := range []struct{ client, to, from, back string }{
		{"192.0.2.9", "192.0.2.1:53", "10.7.0.2:5353", "192.0.2.9"},
		{"192.0.2.9", "192.0.2.1:54", "10.7.0.2:5354", "10.7.0.1"}, // is answered through the host
		{"198.51.100.9", "192.0.2.1:55", "10.7.0.2:5355", "198.51.100.9"},
		{"192.0.2.9", "192.0.2.1:56", "10.7.0.3:5356", "192.0.2.9"},
		{"192.0.2.9", "10.7.0.2:57", "10.7.0.2:57", "192.0.2.9"}, // knows the container by its own address
		{"fd99::9", "[fd99::1]:58", "[fd07::2]:5358", "fd99::9"},
		{"fd99:1::9", "[fd99::1]:59", "[fd07::2]:5359", "fd99:1::9"},
	} {
		client, back := netip.AddrPortFrom(lanAddr(f.client), uint16(5000+i)), netip.AddrPortFrom(lanAddr(f.back), uint16(5000+i))
		family := netlink.InetFamily(unix.AF_INET)
		if client.Addr().Is6() {
			family = unix.AF_INET6
		}
		h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			t.Fatal(err)
		}
		err = h.ConntrackCreate(netlink.ConntrackTable, family, &netlink.ConntrackFlow{
			FamilyType: uint8(family), TimeOut: 600, Forward: tuple(client, addrPort(f.to)), Reverse: tuple(addrPort(f.from), back),
		})
		h.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	left := []string{"10.7.0.2:57=10.7.0.2:57", "192.0.2.1:54=10.7.0.2:5354", "192.0.2.1:55=10.7.0.2:5355", "192.0.2.1:56=10.7.0.3:5356", "fd99::1:59=fd07::2:5359"}
	check := func(when string) {
		t.Helper()
		k.flows.walks.Wait()
		if got := tracked(t); !slices.Equal(got, left) {
			t.Errorf("%s: there are\n%s\nwant\n%s", when, strings.Join(got, "\n"), strings.Join(left, "\n"))
		}
	}
	ensure(t, k, s)
	check("joined")
	remove(t, k, s)
	check("left")
}
