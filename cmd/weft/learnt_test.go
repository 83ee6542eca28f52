package main

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// TestLearnt: routes and MTU of a real server are the container's, and status says
// what Docker takes from no plugin, and what was left out.
func TestLearnt(t *testing.T) {
	for _, k := range []dhcptest.Kind{dhcptest.Dnsmasq, dhcptest.Kea} {
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			l := newLAN(t)
			l.config.DNS, l.config.Domain = []netip.Addr{netip.MustParseAddr("10.77.0.9")}, "lan.example"
			l.config.Routes = []dhcptest.Route{
				{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.77.0.1")},
				{To: netip.MustParsePrefix("10.80.0.0/12"), Via: netip.MustParseAddr("10.77.0.2")},
				{To: netip.MustParsePrefix("10.99.0.0/16"), Via: netip.MustParseAddr("10.77.0.2")},
			}
			dhcptest.Start(t, k, l.router, l.config)
			l.host.Exec("ip", "link", "add", "wg0", "type", "bridge")
			l.host.Exec("ip", "address", "add", "10.99.0.1/24", "dev", "wg0")
			l.start()
			pool, subnet, gateway := l.pool("10.77.0.0/24", `"dhcp":"lan0"`)
			if pool == "" {
				t.Fatal(subnet)
			}
			l.network(subnet, gateway)
			id, refusal := l.endpoint(1, l.request(pool, "", "web"), "")
			l.want("endpoint", refusal, "")
			m := l.must(t, "NetworkDriver.Join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/run/netns/x","Options":{}}`, netID, id))
			l.want("routes", fmt.Sprint(m["StaticRoutes"]), "[map[Destination:10.80.0.0/12 NextHop:10.77.0.2 RouteType:0]]")
			link := fmt.Sprint(m["InterfaceName"].(map[string]any)["SrcName"])
			l.contains("the container's link", l.host.Exec("ip", "link", "show", "dev", link), "mtu 1400")
			_, out, errs := weft(t, "", "status", "--socket", filepath.Join(l.dir, adminSocket))
			for _, want := range []string{
				"the DHCP server on lan0 names resolvers, which Docker takes from no plugin; to use them: --dns 10.77.0.9 --dns-search lan.example",
				"! endpoint " + id[:12] + ": not taken from the DHCP server: route 10.99.0.0/16 covers 10.99.0.0/24, which is that of wg0 on the host",
			} {
				l.contains("status", out+errs, want)
			}
		})
	}
}
