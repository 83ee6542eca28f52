package driver

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/plugin"
)

// bridgeCase is a network as a user types it, with two endpoints: the first has
// every family and publishes ports, the second has IPv4 only where it can.
type bridgeCase struct {
	name     string
	options  string // key=value, space separated
	internal bool
	v4, v6   bool
	ports    []plugin.PortBinding
}

var web = []plugin.PortBinding{
	{Proto: 6, Port: 80, HostPort: 8080, HostPortEnd: 8080},
	{Proto: 17, Port: 53, HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 5353, HostPortEnd: 5353},
	{Proto: 6, Port: 443, HostIP: netip.MustParseAddr("::1"), HostPort: 8443, HostPortEnd: 8443},
}

var bridgeCases = []bridgeCase{
	{name: "default", v4: true, ports: web},
	{name: "dual", v4: true, v6: true, ports: web},
	{name: "ipv6-only", v6: true, ports: web},
	{name: "internal", internal: true, v4: true, v6: true, ports: web},
	{name: "isolated", internal: true, options: "com.docker.network.bridge.gateway_mode_ipv4=isolated com.docker.network.bridge.gateway_mode_ipv6=isolated", v4: true, v6: true},
	{name: "named", options: "com.docker.network.bridge.name=lan7 mtu=1400 com.docker.network.container_iface_prefix=lan", v4: true},
	{name: "no-icc", options: "com.docker.network.bridge.enable_icc=false", v4: true},
	{name: "no-masquerade", options: "com.docker.network.bridge.enable_ip_masquerade=false", v4: true, v6: true},
	{name: "snat", options: "com.docker.network.host_ipv4=192.0.2.7 com.docker.network.host_ipv6=2001:db8::7", v4: true, v6: true},
	{name: "unprotected", options: "com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected com.docker.network.bridge.gateway_mode_ipv6=nat-unprotected", v4: true, v6: true, ports: web},
	{name: "routed", options: "com.docker.network.bridge.gateway_mode_ipv4=routed com.docker.network.bridge.gateway_mode_ipv6=routed", v4: true, v6: true, ports: web},
	{name: "routed6", options: "com.docker.network.bridge.gateway_mode_ipv6=routed", v4: true, v6: true, ports: web},
	{name: "trusted", options: "com.docker.network.bridge.trusted_host_interfaces=vpn0:vpn1", v4: true, ports: web},
	{name: "inhibit", options: "com.docker.network.bridge.inhibit_ipv4=true", v4: true, v6: true},
	{name: "binding", options: "com.docker.network.bridge.host_binding_ipv4=192.0.2.7", v4: true, v6: true, ports: web},
	{name: "existing", options: "bridge=br0", v4: true, v6: true, ports: web},
	{name: "existing-none", options: "bridge=br0 egress=none com.docker.network.bridge.enable_icc=false", v4: true},
	{name: "existing-masquerade", options: "bridge=br0 com.docker.network.bridge.enable_ip_masquerade=true", v4: true},
	{name: "egress-none", options: "egress=none", v4: true, ports: web},
	{name: "egress-engine", options: "egress=engine", v4: true, v6: true, ports: web},
	{name: "routes", options: "routes=10.8.0.0/16_via_10.1.0.254,_fd08::/32_via_fd00:1::fe", v4: true, v6: true},
}

func (c bridgeCase) network() (Network, error) {
	generic := map[string]any{}
	for word := range strings.FieldsSeq(c.options) {
		k, v, _ := strings.Cut(word, "=")
		generic[k] = strings.ReplaceAll(v, "_", " ")
	}
	n, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: generic, plugin.OptionInternal: c.internal}, []string{"bridge"}, modeBridge)
	if err != nil {
		return n, err
	}
	n.ID, n.MTU = net1, 1500
	if n.Options.MTU != 0 {
		n.MTU = n.Options.MTU
	}
	if c.v4 {
		n.Subnets = append(n.Subnets, subnet("10.1.0.0/24", "10.1.0.1/24"))
	}
	if c.v6 {
		n.Subnets = append(n.Subnets, subnet("fd00:1::/64", "fd00:1::1/64"))
	}
	return n, Bridge{}.Validate(&n)
}

func subnet(pool, gateway string) Subnet {
	return Subnet{Pool: netip.MustParsePrefix(pool), Gateway: netip.MustParsePrefix(gateway)}
}

// TestBridge compares what the backend wants with files that people can read.
func TestBridge(t *testing.T) {
	for _, c := range bridgeCases {
		t.Run(c.name, func(t *testing.T) {
			n, err := c.network()
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			fmt.Fprintf(&b, "# network %s internal=%t\n%s", c.options, c.internal, Bridge{}.Network(n))
			for i, addrs := range [][]string{{"10.1.0.2/24", "fd00:1::2/64"}, {"10.1.0.3/24"}} {
				e := Endpoint{ID: []string{ep1, ep2}[i], Network: n.ID}
				for _, a := range addrs {
					if p := netip.MustParsePrefix(a); n.has(familyOf(p.Addr())) {
						e.Addrs = append(e.Addrs, p)
					}
				}
				e.MAC = endpointMAC(e.ID, e.Addrs)
				e.Ports = chosen(t, n, e, c.ports)
				e.Hairpin = translated(e.Ports)
				fmt.Fprintf(&b, "\n# endpoint %v\n%s", e.Addrs, Bridge{}.Endpoint(n, e))
				at := Bridge{}.Attach(n, e)
				fmt.Fprintf(&b, "# join: %s as %s, gateways %v, routes %v, no gateway service %t\n", at.Link, at.Prefix, at.Gateways, at.Routes, at.NoGateway)
			}
			golden(t, "bridge/"+c.name+".txt", b.String())
		})
	}
}

// chosen is what program would publish if every port were free.
func chosen(t *testing.T, n Network, e Endpoint, bindings []plugin.PortBinding) (ports []PublishedPort) {
	t.Helper()
	wire := []any{}
	for _, b := range bindings {
		ip := ""
		if b.HostIP.IsValid() {
			ip = b.HostIP.String()
		}
		wire = append(wire, map[string]any{"Proto": b.Proto, "Port": b.Port, "HostIP": ip, "HostPort": b.HostPort, "HostPortEnd": b.HostPortEnd})
	}
	wishes, err := parseWishes(n, e, map[string]any{plugin.OptionPortMap: wire})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range wishes {
		ports = append(ports, w.under(w.first)...)
	}
	return ports
}

func TestBridgeContradictions(t *testing.T) {
	for _, c := range []struct {
		bridgeCase
		want []string
	}{
		{bridgeCase{options: "bridge=br0 com.docker.network.bridge.name=br1", v4: true}, []string{"bridge=br0", "bridge.name=br1"}},
		{bridgeCase{options: "com.docker.network.bridge.gateway_mode_ipv4=isolated", v4: true}, []string{"isolated", "--internal"}},
		{bridgeCase{options: "egress=engine", internal: true, v4: true}, []string{"egress=engine", "--internal"}},
		{bridgeCase{options: "egress=driver", internal: true, v4: true}, []string{"egress=driver", "--internal"}},
		{bridgeCase{options: "egress=none com.docker.network.host_ipv4=192.0.2.1", v4: true}, []string{"host_ipv4", "egress=none"}},
		{bridgeCase{options: "egress=engine com.docker.network.bridge.gateway_mode_ipv4=routed", v4: true}, []string{"gateway_mode_ipv4", "egress=engine"}},
		{bridgeCase{options: "com.docker.network.host_ipv4=192.0.2.1 com.docker.network.bridge.enable_ip_masquerade=false", v4: true}, []string{"host_ipv4", "enable_ip_masquerade=true"}},
		{bridgeCase{options: "bridge=br0", internal: true, v4: true}, []string{"bridge=br0", "--internal", "egress=none"}},
		{bridgeCase{options: "bridge=br0 com.docker.network.bridge.inhibit_ipv4=true", v4: true}, []string{"inhibit_ipv4", "bridge=br0"}},
		{bridgeCase{options: "bridge=br0 com.docker.network.bridge.trusted_host_interfaces=x", v4: true}, []string{"trusted_host_interfaces", "bridge=br0"}},
		{bridgeCase{options: "bridge=br0 com.docker.network.bridge.gateway_mode_ipv4=routed", v4: true}, []string{"gateway mode", "bridge=br0"}},
		{bridgeCase{options: "mtu=1279", v6: true}, []string{"1279", "1280"}},
		{bridgeCase{options: "routes=10.8.0.0/16_via_10.2.0.1", v4: true}, []string{"10.2.0.1", "10.1.0.0/24"}},
		{bridgeCase{options: "routes=10.1.0.0/25_via_10.1.0.9", v4: true}, []string{"10.1.0.0/25", "10.1.0.0/24"}},
		{bridgeCase{options: "mtu=1400 com.docker.network.driver.mtu=1500", v4: true}, []string{"mtu=1400", "driver.mtu=1500"}},
	} {
		_, err := c.network()
		if err == nil {
			t.Errorf("%s: accepted", c.options)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: error %q does not say %q", c.options, err, w)
			}
		}
	}
}

func TestNames(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{bridgeName(net1), "wfb1a2b3c4d5e6f"},
		{hostEnd(ep1), "wfve11111111111"},
		{peerEnd(ep1), "wfce11111111111"},
		{bridgeName(swm1), "wfb" + digits(swm1)},
		{endpointMAC(ep1, []netip.Prefix{netip.MustParsePrefix("fd00::2/64"), netip.MustParsePrefix("10.1.0.2/24")}).String(), "02:42:0a:01:00:02"},
	} {
		if c.got != c.want || len(c.got) > 17 {
			t.Errorf("got %s, want %s", c.got, c.want)
		}
	}
	other := strings.TrimSuffix(swm1, "w") + "x"
	if a, b := bridgeName(swm1), bridgeName(other); a == b || len(a) != 15 || strings.Contains(a, swm1[:6]) {
		t.Errorf("swarm networks get %s and %s", a, b)
	}
	six := []netip.Prefix{netip.MustParsePrefix("fd00::2/64")}
	if a, b := endpointMAC(ep1, six), endpointMAC(ep2, six); a != b || a[0]&3 != 2 {
		t.Errorf("the address fd00::2 has the MACs %s and %s", a, b)
	}
	if a, b := endpointMAC(ep1, nil), endpointMAC(ep2, nil); a == b {
		t.Errorf("two endpoints without address have the MAC %s", a)
	}
}
