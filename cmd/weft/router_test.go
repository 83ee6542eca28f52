package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// TestDHCPWithoutRouter: a LAN without a router, or with one that is of no use there, is
// one whose containers have no default route, also where the host is on it.
func TestDHCPWithoutRouter(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*dhcptest.Config){
		"none":    func(c *dhcptest.Config) { c.Router = netip.Addr{} },
		"outside": func(c *dhcptest.Config) { c.Router = netip.MustParseAddr("10.78.0.1") },
		"no default route": func(c *dhcptest.Config) {
			c.Routes = []dhcptest.Route{{To: netip.MustParsePrefix("10.80.0.0/12"), Via: netip.MustParseAddr("10.77.0.2")}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLAN(t)
			change(&l.config)
			dhcptest.Start(t, dhcptest.ISC, l.router, l.config)
			l.host.Exec("ip", "address", "add", "10.77.0.5/24", "dev", "lan0")
			l.start()
			id, pool, gateway := l.pool("", `"dhcp":"lan0"`)
			l.want("subnet", pool, "0.0.0.0/0")
			l.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{"mode":"macvlan","parent":"lan0"}},`+
				`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"0.0.0.0/0","Gateway":"`+gateway+`"}],"IPv6Data":[]}`)
			n := l.status(t).Networks
			if len(n) != 1 || len(n[0].Subnets) != 1 || n[0].Subnets[0].Pool.String() != "10.77.0.0/24" || n[0].Subnets[0].Gateway != "" {
				t.Errorf("%+v", n)
			}
			end := strings.Repeat("e", 64)
			l.must(t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q},"Options":{}}`, netID, end, l.request(id, "", "web")))
			m := l.must(t, "NetworkDriver.Join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/var/run/docker/netns/x","Options":{}}`, netID, end))
			if g, _ := m["Gateway"].(string); g != "" || m["DisableGatewayService"] != true {
				t.Errorf("%v", m)
			}
			l.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, end))
			l.must(t, "NetworkDriver.DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, netID))
		})
	}
}

// TestDHCPOfAnotherDriver: the LAN is asked for what is leased for networks of Docker's
// own macvlan, too, of which this plugin knows nothing else.
func TestDHCPOfAnotherDriver(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	server := dhcptest.Start(t, dhcptest.ISC, l.router, l.config)
	for _, a := range []string{"10.77.0.101", "10.77.0.102"} { // of stations that ask no server
		l.router.Exec("ip", "address", "add", a+"/32", "dev", "eth0")
	}
	l.start()
	id, _, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0"`)
	if got := first(l.request(id, "", "web")); !got.IsValid() || got.String() == "10.77.0.101" || got.String() == "10.77.0.102" {
		t.Errorf("leased %s", got)
	}
	if n := strings.Count(server.Log(), "DHCPDECLINE of 10.77.0.101"); n != 1 {
		t.Errorf("declined %d times", n)
	}
}
