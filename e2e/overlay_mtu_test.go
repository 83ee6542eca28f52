//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// underlayMTU sets that of a host's card and of the switch's port.
func (e *engine) underlayMTU(tb testing.TB, mtu int) {
	tb.Helper()
	e.lan.wire.net(tb, "ip", "link", "set", "p-"+e.name, "mtu", fmt.Sprint(mtu))
	e.net(tb, "ip", "link", "set", "lan0", "mtu", fmt.Sprint(mtu))
}

// mtus is two hosts on LANs of other sizes than Ethernet's; a tunnel takes so
// much of a packet.
func (all members) mtus(t *testing.T, overhead int) {
	t.Helper()
	host1, host2 := all[0], all[1]
	create := func(e *engine) []string { return e.overlayArgs("sized", 60, "-o", "vni=6000") }
	set := func(first, second int) {
		host1.underlayMTU(t, first)
		host2.underlayMTU(t, second)
	}
	defer set(1500, 1500)
	for _, mtu := range []int{9000, 1400} {
		set(mtu, mtu)
		host1.must(t, create(host1)...)
		host2.must(t, create(host2)...)
		all.carries(t, "sized", mtu-overhead)
	}
	// The smaller one second: what the first has does not fit there.
	set(9000, 1400)
	host1.must(t, create(host1)...)
	host2.refuses(t, []string{"host1", fmt.Sprint("mtu ", 9000-overhead), fmt.Sprint(1400 - overhead), "make it alike"}, create(host2)...)
	host1.must(t, "network", "rm", "sized")
	// The smaller one first: the second host takes it.
	host2.must(t, create(host2)...)
	host1.must(t, create(host1)...)
	all.carries(t, "sized", 1400-overhead)
}

// carries starts a container on each host of a network with this MTU, and lets
// packets as large as that pass, and none larger. Then all goes.
func (all members) carries(t *testing.T, network string, mtu int) {
	t.Helper()
	list := all.boxes(t, network)
	for _, b := range list {
		ifs := b.facts(t)
		i := slices.IndexFunc(ifs, func(l iface) bool {
			return slices.ContainsFunc(l.Addrs, func(a string) bool { return strings.HasPrefix(a, b.addrs[0]+"/") })
		})
		if i < 0 || ifs[i].MTU != mtu {
			t.Errorf("%s on %s: %+v, want MTU %d", b.name, b.e.name, ifs, mtu)
		}
	}
	all.agree(t, network)
	for _, e := range all {
		if got := e.overlay(t, network).mtu; got != mtu {
			t.Errorf("%s: the tunnel's MTU is %d, want %d", e.name, got, mtu)
		}
	}
	reachAll(t, list)
	for _, pair := range [][2]box{{list[0], list[2]}, {list[2], list[1]}} { // across, both ways
		for _, a := range pair[1].addrs {
			for size, want := range map[int]string{mtu: fmt.Sprintf(`{"src":%q}`, a), mtu + 1: `{"err":"too long"}`} {
				if out, err := pair[0].probe("ping", "-size", fmt.Sprint(size), a); err != nil || out != want {
					t.Errorf("%s to %s with %d bytes: %s %v, want %s", pair[0].name, a, size, out, err, want)
				}
			}
			if strings.Contains(a, ":") {
				a = "[" + a + "]"
			}
			if _, err := pair[0].probe("carry", a+":80", "20000000"); err != nil {
				t.Errorf("%s to %s: %v", pair[0].name, a, err)
			}
		}
	}
	all.drop(t, network, list)
}
