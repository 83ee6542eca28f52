package dhcp

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
	"github.com/weftnet/weft/internal/netnstest"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// The LANs of the tests, and what their servers hand out.
var (
	lan4 = prefix("10.77.0.0/24")
	lan6 = prefix("fd77::/64")
)

var config4 = dhcptest.Config{
	Link:   "eth0",
	Subnet: lan4,
	First:  addr("10.77.0.100"),
	Last:   addr("10.77.0.250"),
	Lease:  2 * time.Minute,
	DNS:    []netip.Addr{addr("10.77.0.1"), addr("9.9.9.9")},
	Domain: "lan.example",
	MTU:    1400,
	Routes: []dhcptest.Route{
		{To: prefix("0.0.0.0/0"), Via: addr("10.77.0.1")},
		{To: prefix("10.80.0.0/12"), Via: addr("10.77.0.2")},
	},
	Router: addr("10.77.0.9"),
}

var config6 = dhcptest.Config{
	Link:   "eth0",
	Subnet: lan6,
	First:  addr("fd77::1000"),
	Last:   addr("fd77::1fff"),
	Lease:  2 * time.Minute,
	DNS:    []netip.Addr{addr("fd77::1")},
	Domain: "lan.example",
}

var families = map[string]dhcptest.Config{"IPv4": config4, "IPv6": config6}

// newLAN is a host with a card lan0, entered, and a router at the other end of
// the cable with an address of each family.
func newLAN(tb testing.TB) (host, router *netnstest.NS) {
	tb.Helper()
	host = netnstest.Enter(tb)
	withoutDAD(tb)
	router = newRouter(tb)
	host.Exec("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	host.Exec("ip", "link", "set", "lan0", "up")
	router.Take("lan1", "eth0", prefix("10.77.0.1/24"), prefix("fd77::1/64"))
	awaitCarrier(tb, "lan0")
	return host, router
}

func newRouter(tb testing.TB) *netnstest.NS {
	tb.Helper()
	router := netnstest.New(tb)
	router.Do(func() { withoutDAD(tb) })
	return router
}

// withoutDAD makes link-local addresses of the namespace usable at once.
func withoutDAD(tb testing.TB) {
	tb.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0); err != nil {
		tb.Fatal(err)
	}
}

// awaitCarrier waits until the link of this namespace can be used for both
// protocols.
func awaitCarrier(tb testing.TB, link string) {
	tb.Helper()
	var err error
	for range 300 {
		var c *socket
		if _, c, err = dial(link, station(1), true); err == nil {
			c.close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatalf("%s: %v", link, err)
}

// station is one of many on the test's host.
func station(n int) Station {
	return Station{
		MAC:  [6]byte{2, 0x77, 0, 0, byte(n >> 8), byte(n)},
		IAID: uint32(n),
		DUID: DUID([16]byte{15: 7}),
	}
}

// hasty has less patience than servers of the LAN need, and gives up in 0.7 s.
func hasty() *Client {
	return &Client{waits: []time.Duration{200 * time.Millisecond, 200 * time.Millisecond, 300 * time.Millisecond}}
}
