package driver

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/datapath"
)

// TestEngines plays a container's life as three engines were seen to send it.
func TestEngines(t *testing.T) {
	type step struct{ method, body, want string }
	life := func(create, endpoint, mac string, between []step, order ...step) []step {
		name := `"DstPrefix":"eth"`
		if strings.Contains(endpoint, "ifname") {
			name = `"DstPrefix":"lan","DstName":"lan0"`
		}
		return append(append([]step{
			{"CreateNetwork", create, "{}"},
			{"CreateEndpoint", endpoint, `{"Interface":{"Address":"","AddressIPv6":"","MacAddress":"` + mac + `"}}`},
			{"Join", `{"NetworkID":"` + net1 + `","EndpointID":"` + ep1 + `","SandboxKey":"/var/run/docker/netns/0123456789ab","Options":{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}]}}`,
				`{"Gateway":"10.5.0.1","GatewayIPv6":"","StaticRoutes":null,"DisableGatewayService":false,"InterfaceName":{"SrcName":"wfce11111111111",` + name + `}}`},
		}, between...), order...)
	}
	end := []step{
		{"RevokeExternalConnectivity", ids(net1, ep1), "{}"},
		{"Leave", ids(net1, ep1), "{}"},
		{"DeleteEndpoint", ids(net1, ep1), "{}"},
		{"DeleteNetwork", `{"NetworkID":"` + net1 + `"}`, "{}"},
	}
	ports := `"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}]`
	info := step{"EndpointOperInfo", ids(net1, ep1), `{"Value":{}}`}
	for name, steps := range map[string][]step{
		"20.10": life(
			`{"NetworkID":"`+net1+`","Options":{"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{}},"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.5.0.0/24","Gateway":"10.5.0.1/24"}],"IPv6Data":[]}`,
			`{"NetworkID":"`+net1+`","EndpointID":"`+ep1+`","Interface":{"Address":"10.5.0.2/24","AddressIPv6":"","MacAddress":""},"Options":{`+ports+`}}`,
			"02:42:0a:05:00:02",
			[]step{{"ProgramExternalConnectivity", `{"NetworkID":"` + net1 + `","EndpointID":"` + ep1 + `","Options":{` + ports + `}}`, "{}"}, info}, end...),
		"28": life(
			`{"NetworkID":"`+net1+`","Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{"com.docker.network.advertise_addr_nmsgs":"2"}},"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.5.0.0/24","Gateway":"10.5.0.1/24","AuxAddresses":{"a1":"10.5.0.5/24"}}],"IPv6Data":[]}`,
			`{"NetworkID":"`+net1+`","EndpointID":"`+ep1+`","Interface":{"Address":"10.5.0.2/24","AddressIPv6":"","MacAddress":"02:11:22:33:44:55"},"Options":{"com.docker.network.endpoint.macaddress":"AhEiM0RV",`+ports+`}}`,
			"",
			[]step{info, {"ProgramExternalConnectivity", `{"NetworkID":"` + net1 + `","EndpointID":"` + ep1 + `","Options":{"com.docker.network.driver.private.no_proxy_6to4":false,` + ports + `}}`, "{}"}}, end...),
		"29": append(life(
			`{"NetworkID":"`+net1+`","Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{}},"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.5.0.0/24","Gateway":"10.5.0.1/24","AuxAddresses":{}}],"IPv6Data":[]}`,
			`{"NetworkID":"`+net1+`","EndpointID":"`+ep1+`","Interface":{"Address":"10.5.0.2/24","AddressIPv6":"","MacAddress":""},"Options":{"com.docker.network.endpoint.ifname":"lan0","com.docker.network.endpoint.sysctls":"net.ipv4.conf.IFNAME.log_martians=1",`+ports+`}}`,
			"02:42:0a:05:00:02",
			[]step{{"ProgramExternalConnectivity", `{"NetworkID":"` + net1 + `","EndpointID":"` + ep1 + `","Options":{` + ports + `}}`, "{}"}, info},
			// Revoke was lost with the plugin's restart, and Leave comes twice.
			step{"Leave", ids(net1, ep1), "{}"}), step{"Leave", ids(net1, ep1), "{}"}, end[2], end[3]),
	} {
		t.Run(name, func(t *testing.T) {
			for _, restarts := range []bool{false, true} {
				r := newRig(t)
				for _, s := range steps {
					if got := r.must(s.method, s.body); got != s.want {
						t.Errorf("%s answered %s, want %s", s.method, got, s.want)
					}
					if s.method == "Join" {
						r.kernel.moveIn(veth1)
					}
					if restarts {
						before := r.kernel.text()
						r.restart()
						if after := r.kernel.text(); after != before {
							t.Errorf("restart after %s changed\n%s", s.method, cmp.Diff(before, after))
						}
					}
					r.idle()
				}
				r.empty()
			}
		})
	}
}

func TestUnknownThings(t *testing.T) {
	r := newRig(t)
	for _, method := range []string{"Leave", "DeleteEndpoint", "RevokeExternalConnectivity"} {
		r.must(method, ids(net1, ep1))
	}
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("FreeNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","BindAddress":"","Self":false}}`)
	r.must("DiscoverDelete", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","BindAddress":"","Self":false}}`)
	r.refused("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""), "network 1a2b3c4d5e6f", "is not known")
	r.refused("Join", joinBody(net1, ep1), "network 1a2b3c4d5e6f", "is not known")
	r.refused("AllocateNetwork", `{"NetworkID":"x","Options":{},"IPv4Data":[]}`, "local to a node")
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	for _, method := range []string{"Leave", "DeleteEndpoint", "RevokeExternalConnectivity"} {
		r.must(method, ids(net1, ep1))
	}
	r.refused("Join", joinBody(net1, ep1), "endpoint e11111111111", "is not known")
	r.refused("ProgramExternalConnectivity", program(net1, ep1), "endpoint e11111111111", "is not known")
}

func TestEmptyIDs(t *testing.T) {
	r := newRig(t)
	for _, method := range []string{"CreateNetwork", "DeleteNetwork"} {
		r.refused(method, `{"NetworkID":""}`, "network id is empty")
	}
	r.refused("CreateNetwork", `{"NetworkID":"a/b"}`, "is not one")
	for _, method := range []string{"CreateEndpoint", "DeleteEndpoint", "Join", "Leave", "EndpointOperInfo", "ProgramExternalConnectivity", "RevokeExternalConnectivity"} {
		r.refused(method, ids("", ep1), "network id is empty")
		r.refused(method, ids(net1, ""), "endpoint id is empty")
	}
}

func TestCreateNetworkAgain(t *testing.T) {
	for _, id := range []string{net1, swm1} {
		r := newRig(t)
		r.must("CreateNetwork", createNetwork(id, "10.1.0.0/24", `{"mtu":"1400"}`))
		r.must("CreateEndpoint", createEndpoint(id, ep1, "10.1.0.2/24", ""))
		r.must("CreateEndpoint", createEndpoint(id, ep2, "10.1.0.3/24", ""))
		r.must("Join", joinBody(id, ep1))
		r.refused("CreateNetwork", createNetwork(id, "10.2.0.0/24", `{"mtu":"1400"}`), "exists already with other settings")
		r.refused("CreateNetwork", createNetwork(id, "10.1.0.0/24", `{"mtu":"1300"}`), "exists already with other settings")
		if n := len(r.kernel.veths); n != 2 {
			t.Fatalf("%d links, want 2", n)
		}
		r.restart()
		r.must("CreateNetwork", createNetwork(id, "10.1.0.0/24", `{"mtu":"1400"}`))
		if n := len(r.kernel.veths); n != 0 {
			t.Errorf("%d links after the network came again, want none", n)
		}
		r.idle()
		r.must("CreateEndpoint", createEndpoint(id, ep3, "10.1.0.2/24", ""))
		r.must("DeleteNetwork", `{"NetworkID":"`+id+`"}`)
		r.empty()
	}
}

func TestNetworksThatGetInTheWay(t *testing.T) {
	r := newRig(t)
	r.kernel.foreign["br0"] = true
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"com.docker.network.bridge.name":"lan7"}`))
	r.refused("CreateNetwork", createNetwork(net2, "10.1.0.0/24", ""), "10.1.0.0/24", "network 1a2b3c4d5e6f")
	r.refused("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"com.docker.network.bridge.name":"lan7"}`), "bridge lan7", "network 1a2b3c4d5e6f")
	r.refused("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"bridge":"lan7"}`), "bridge lan7", "network 1a2b3c4d5e6f")
	r.refused("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"bridge":"br9"}`), "bridge br9 does not exist")
	r.refused("CreateNetwork", `{"NetworkID":"`+net2+`","IPv4Data":[{"Pool":"10.2.0.0/24"},{"Pool":"10.2.0.0/25"}]}`, "10.2.0.0/24 and 10.2.0.0/25 overlap")
	if got, want := strings.Join(r.records(), " "), "network/"+net1; got != want {
		t.Errorf("records %s, want %s", got, want)
	}
	if id, ok := r.d.Subnet(netip.MustParsePrefix("10.1.0.128/25")); !ok || id != net1 {
		t.Errorf("Subnet says %q, %t", id, ok)
	}
	if id, ok := r.d.Subnet(netip.MustParsePrefix("10.3.0.0/24")); ok {
		t.Errorf("Subnet says %q", id)
	}
	// On a LAN several may have its subnet, and nobody else.
	r.must("CreateNetwork", createNetwork(net2, "10.3.0.0/24", `{"bridge":"br0"}`))
	net3, net4 := strings.Repeat("3", 64), strings.Repeat("4", 64)
	r.must("CreateNetwork", createNetwork(net3, "10.3.0.0/24", `{"bridge":"br0"}`))
	r.refused("CreateNetwork", createNetwork(net4, "10.3.0.0/24", ""), "subnet 10.3.0.0/24 overlaps with one of network", "choose another --subnet")
	if n := r.d.Subnets(netip.MustParsePrefix("10.3.0.0/25")); n != 2 {
		t.Errorf("Subnets says %d", n)
	}
	if n := r.d.Subnets(netip.MustParsePrefix("10.4.0.0/24")); n != 0 {
		t.Errorf("Subnets says %d of a subnet that none has", n)
	}
}

// TestSharedBridge has two networks on one bridge that is not ours: what they
// share goes with the second.
func TestSharedBridge(t *testing.T) {
	r := newRig(t)
	r.kernel.foreign["br0"] = true
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"bridge":"br0"}`))
	one := r.kernel.text()
	if want := "nft add element inet weft home { br0 . 10.1.0.0/24 }\nnft add element inet weft pass { br0 . br0 }\niptables hook\n"; one != want {
		t.Fatalf("one network is\n%s\nwant\n%s", one, want)
	}
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"bridge":"br0"}`))
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	if got := r.kernel.text(); got != strings.ReplaceAll(one, "10.1.", "10.2.") {
		t.Errorf("the second network is left with\n%s\nwant\n%s", got, one)
	}
	r.idle()
	r.must("DeleteNetwork", `{"NetworkID":"`+net2+`"}`)
	r.empty()
	if !r.kernel.foreign["br0"] {
		t.Error("br0 is gone")
	}
}

func TestBridgeNameOfSomebodyElse(t *testing.T) {
	r := newRig(t)
	r.host.bridge("lan7", "10.8.0.2/24")
	body := createNetwork(net1, "10.1.0.0/24", `{"com.docker.network.bridge.name":"lan7"}`)
	r.must("CreateNetwork", body)
	r.must("CreateNetwork", body)
	if len(r.kernel.bridges) != 0 {
		t.Errorf("made a bridge: %v", r.kernel.bridges)
	}
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	if m := r.kernel.veths[veth1].Master; m != "lan7" {
		t.Errorf("the link is in %q", m)
	}
	r.restart()
	r.idle()
	r.must("CreateNetwork", body)
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.empty()
}

func TestCreateEndpointAgain(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createDual(""))
	first := r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
	if again := r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64")); again != first {
		t.Errorf("answered %s, then %s", first, again)
	}
	if n := r.kernel.made[veth1]; n != 1 {
		t.Errorf("made the link %d times", n)
	}
	r.refused("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.3/24", "fd00:1::2/64"), "endpoint e11111111111 exists already")
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""), "10.1.0.2", "endpoint e11111111111")
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", "fd00:1::2/64"), "fd00:1::2", "endpoint e11111111111")
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.9.0.3/24", ""), "10.9.0.3", "10.1.0.0/24")
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3", ""), `"10.1.0.3"`)
	r.refused("CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":"10.1.0.4/24"},"Options":{"speed":"10"}}`, net1, ep2), `"speed"`, "mode bridge")
	r.refused("CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"MacAddress":"01:00:5e:00:00:01"}}`, net1, ep2), "01:00:5e:00:00:01")

	// The engine may hand an address on between Leave and DeleteEndpoint.
	r.must("Leave", ids(net1, ep1))
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
	before := r.kernel.text()
	r.must("DeleteEndpoint", ids(net1, ep1))
	if after := r.kernel.text(); after != before {
		t.Errorf("deleting the old endpoint took from the new:\n%s", cmp.Diff(before, after))
	}
}

// TestAddressHandOnAttached is the same where the two share an element.
func TestAddressHandOnAttached(t *testing.T) {
	r := newRig(t)
	r.kernel.foreign["br0"] = true
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"bridge":"br0"}`))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("Leave", ids(net1, ep1))
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
	r.must("DeleteEndpoint", ids(net1, ep1))
	if !strings.Contains(r.kernel.text(), "attached { br0 . 10.1.0.2/32 }") {
		t.Errorf("the new endpoint lost its element:\n%s", r.kernel.text())
	}
}

// TestForgottenEndpoint is a CreateEndpoint interrupted by our death: the
// engine was told that it failed, and gives the address to the next.
func TestForgottenEndpoint(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""), "in use")
	r.restart()
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
	if got := r.kernel.text(); strings.Contains(got, veth1) {
		t.Errorf("the first link is left:\n%s", got)
	}

	// One that was joined keeps its address, whatever restarts.
	r.must("Join", joinBody(net1, ep2))
	r.kernel.moveIn(hostEnd(ep2))
	r.restart()
	r.refused("CreateEndpoint", createEndpoint(net1, ep3, "10.1.0.2/24", ""), "in use", "e22222222222")
	r.clock.pass(2 * joinTime)
	r.idle()

	// One that nobody joins is forgotten after a while, not before.
	r.must("CreateEndpoint", createEndpoint(net1, ep3, "10.1.0.3/24", ""))
	r.idle()
	r.clock.pass(joinTime)
	if lines := r.reconcile(); len(lines) != 1 || !strings.Contains(lines[0], "e33333333333") {
		t.Errorf("reconcile says %q", lines)
	}
	r.idle()
	if got := r.kernel.text(); strings.Contains(got, hostEnd(ep3)) || !strings.Contains(got, hostEnd(ep2)) {
		t.Errorf("left:\n%s", got)
	}
}

func TestJoin(t *testing.T) {
	for name, c := range map[string]struct {
		options, internal string
		want              map[string]any
	}{
		"default": {want: map[string]any{"Gateway": "10.1.0.1", "GatewayIPv6": "fd00:1::1", "DisableGatewayService": false}},
		"prefix": {options: `{"com.docker.network.container_iface_prefix":"lan"}`,
			want: map[string]any{"InterfaceName": map[string]any{"SrcName": "wfce11111111111", "DstPrefix": "lan"}}},
		"internal": {internal: `"com.docker.network.internal":true,`,
			want: map[string]any{"Gateway": "", "GatewayIPv6": "", "DisableGatewayService": true}},
		"none":   {options: `{"egress":"none"}`, want: map[string]any{"Gateway": "", "GatewayIPv6": "", "DisableGatewayService": true}},
		"engine": {options: `{"egress":"engine"}`, want: map[string]any{"Gateway": "", "GatewayIPv6": "", "DisableGatewayService": false}},
		"routes": {options: `{"routes":"10.8.0.0/16 via 10.1.0.254,fd08::/32 via fd00:1::fe"}`,
			want: map[string]any{"StaticRoutes": []any{
				map[string]any{"Destination": "10.8.0.0/16", "RouteType": 0.0, "NextHop": "10.1.0.254"},
				map[string]any{"Destination": "fd08::/32", "RouteType": 0.0, "NextHop": "fd00:1::fe"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.must("CreateNetwork", strings.Replace(createDual(c.options), `"com.docker.network.generic"`, c.internal+`"com.docker.network.generic"`, 1))
			r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
			var got map[string]any
			if err := json.Unmarshal([]byte(r.must("Join", joinBody(net1, ep1))), &got); err != nil {
				t.Fatal(err)
			}
			for field, want := range c.want {
				if diff := cmp.Diff(want, got[field]); diff != "" {
					t.Errorf("%s: %s", field, diff)
				}
			}
		})
	}
}

// TestIPv6Only: engines before 28 do not count an IPv6 gateway.
func TestIPv6Only(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", `{"NetworkID":"`+net1+`","Options":{"com.docker.network.enable_ipv4":false,"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{}},"IPv4Data":[],"IPv6Data":[{"Pool":"fd00:1::/64","Gateway":"fd00:1::1/64"}]}`)
	answer := r.must("CreateEndpoint", createEndpoint(net1, ep1, "", "fd00:1::2/64"))
	if strings.Contains(answer, "02:42:") || strings.Contains(answer, `"MacAddress":""`) {
		t.Errorf("answered %s", answer)
	}
	got := r.must("Join", joinBody(net1, ep1))
	if !strings.Contains(got, `"GatewayIPv6":"fd00:1::1"`) || !strings.Contains(got, `"DisableGatewayService":true`) {
		t.Errorf("answered %s", got)
	}
}

// TestNullIPAM: nobody hands out addresses.
func TestNullIPAM(t *testing.T) {
	r := newRig(t)
	r.kernel.foreign["br0"] = true
	r.must("CreateNetwork", `{"NetworkID":"`+net1+`","Options":{"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{"bridge":"br0"}},"IPv4Data":[{"AddressSpace":"null","Pool":"0.0.0.0/0"}],"IPv6Data":[]}`)
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "", ""))
	if got := r.must("Join", joinBody(net1, ep1)); !strings.Contains(got, `"Gateway":""`) || !strings.Contains(got, `"DisableGatewayService":true`) {
		t.Errorf("answered %s", got)
	}
}

func TestLeaveAndJoinAgain(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	made := r.kernel.text()
	first := r.must("Join", joinBody(net1, ep1))
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
	r.must("Leave", ids(net1, ep1))
	if got := r.kernel.text(); strings.Contains(got, "wfv") || strings.Contains(got, "8080") {
		t.Errorf("after Leave there is\n%s", got)
	}
	r.refused("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)), "has left")
	r.restart()
	if again := r.must("Join", joinBody(net1, ep1)); again != first {
		t.Errorf("answered %s, then %s", first, again)
	}
	if got := r.kernel.text(); got != made {
		t.Errorf("joined again:\n%s", cmp.Diff(made, got))
	}
}

func TestGwAllocCheck(t *testing.T) {
	r := newRig(t)
	for options, want := range map[string]string{
		`{}`: `{"SkipIPv4":false,"SkipIPv6":false}`,
		`{"com.docker.network.generic":{"com.docker.network.bridge.gateway_mode_ipv6":"isolated"}}`:                           `{"SkipIPv4":false,"SkipIPv6":true}`,
		`{"com.docker.network.generic":{"com.docker.network.bridge.inhibit_ipv4":"true"}}`:                                    `{"SkipIPv4":false,"SkipIPv6":false}`,
		`{"com.docker.network.internal":true,"com.docker.network.generic":{"com.docker.network.bridge.inhibit_ipv4":"true"}}`: `{"SkipIPv4":true,"SkipIPv6":false}`,
		`{"com.docker.network.generic":{"bridge":"br0","egress":"none"}}`:                                                     `{"SkipIPv4":true,"SkipIPv6":true}`,
		`{"com.docker.network.generic":{"bridge":"br0"}}`:                                                                     `{"SkipIPv4":false,"SkipIPv6":false}`,
		`{"com.docker.network.generic":{"egress":"none"}}`:                                                                    `{"SkipIPv4":false,"SkipIPv6":false}`,
		`{"com.docker.network.generic":{"mode":"macvlan","parent":"eth0"}}`:                                                   `{"SkipIPv4":true,"SkipIPv6":true}`,
		`{"com.docker.network.generic":{"mode":"macvlan"}}`:                                                                   `{"SkipIPv4":true,"SkipIPv6":true}`,
		`{"com.docker.network.internal":true,"com.docker.network.generic":{"mode":"macvlan","parent":"eth0"}}`:                `{"SkipIPv4":true,"SkipIPv6":true}`,
		`{"com.docker.network.generic":{"mode":"macvlan","parent":"eth0","egress":"engine"}}`:                                 `{"SkipIPv4":true,"SkipIPv6":true}`,
		`{"com.docker.network.generic":{"mode":"ipvlan","parent":"eth0"}}`:                                                    `{"SkipIPv4":true,"SkipIPv6":true}`,
		`{"com.docker.network.generic":{"mode":"ipvlan","parent":"eth0","ipvlan_mode":"l3"}}`:                                 `{"SkipIPv4":true,"SkipIPv6":true}`,
	} {
		if got := r.must("GwAllocCheck", `{"Options":`+options+`}`); got != want {
			t.Errorf("%s: answered %s, want %s", options, got, want)
		}
	}
	r.refused("GwAllocCheck", `{"Options":{"com.docker.network.generic":{"brigde":"br0"}}}`, `"brigde"`, `"bridge"`)
	if got := r.must("GetCapabilities", `{}`); got != `{"Scope":"local","ConnectivityScope":"local","GwAllocChecker":true}` {
		t.Errorf("capabilities %s", got)
	}
}

func TestStatus(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createDual(""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "127.0.0.1", 8080, 8080)))
	r.must("Leave", ids(net1, ep2))
	r.kernel.mu.Lock()
	r.kernel.hook = false
	r.kernel.mu.Unlock()
	r.reconcile()
	s, err := r.d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "status.json", string(b)+"\n")
}

// TestJoinAgainTooLate: the address has a new owner by then.
func TestJoinAgainTooLate(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("Leave", ids(net1, ep1))
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
	r.refused("Join", joinBody(net1, ep1), "10.1.0.2", "in use", "e22222222222")
	r.refused("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""), "in use")
	r.must("DeleteEndpoint", ids(net1, ep2))
	r.must("Join", joinBody(net1, ep1))
}

// TestHookAfterBoot: the engine sets FORWARD to DROP after our start and before
// its first container.
func TestHookAfterBoot(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", "{}"))
	r.restart()
	r.kernel.hook = false
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	if !r.kernel.hook {
		t.Error("the first container is behind the engine's DROP")
	}
	r.kernel.hook = false
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	if r.kernel.hook {
		t.Error("every container looks at others' rules")
	}
	r.reconcile()
	if !r.kernel.hook {
		t.Error("the pass does not put the hook back")
	}
}

// TestAbandonedNetwork: we died between the last step of CreateNetwork and the
// answer. The engine takes its addresses back, and never deletes the network.
func TestAbandonedNetwork(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", "{}"))
	r.clock.at = r.clock.at.Add(time.Second)
	r.restart()
	r.must("CreateNetwork", createNetwork(net2, "10.1.0.0/24", "{}"))
	if got, want := strings.Join(r.records(), " "), "network/"+net2; got != want {
		t.Errorf("records %s, want %s", got, want)
	}
	r.idle()
	// One that was used is the engine's, and one that is old was not cut off.
	r.must("CreateEndpoint", createEndpoint(net2, ep1, "10.1.0.2/24", ""))
	r.restart()
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", "{}"), "10.1.0.0/24 overlaps")
	r.must("DeleteEndpoint", `{"NetworkID":"`+net2+`","EndpointID":"`+ep1+`"}`)
	r.clock.at = r.clock.at.Add(answerTime)
	r.restart()
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", "{}"), "10.1.0.0/24 overlaps")
}

// A LAN's DHCP server that is slow to answer for a chosen MAC address keeps nobody
// else waiting: no lock is held while it is asked, and for a call that comes again
// it is not asked.
func TestChosenMACHoldsNoLock(t *testing.T) {
	var r *rig
	var asked []string
	r = newRigWith(t, func(c *Config) {
		c.Restation = func(_ context.Context, pool netip.Prefix, a netip.Addr, mac datapath.MAC, _ map[string]string) error {
			asked = append(asked, fmt.Sprint(pool, " ", a, " ", mac))
			for name, l := range map[string]interface {
				TryLock() bool
				Unlock()
			}{"change": &r.d.change, "mu": &r.d.mu, "the network's": &r.d.networks[net1].mu} {
				if !l.TryLock() {
					t.Errorf("lock %s is held while the DHCP server is asked", name)
					continue
				}
				l.Unlock()
			}
			return nil
		}
	})
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	chosen := strings.Replace(createEndpoint(net1, ep1, "10.1.0.2/24", ""), `"MacAddress":""`, `"MacAddress":"02:42:0a:01:00:63"`, 1)
	r.refused("CreateEndpoint", strings.Replace(chosen, "10.1.0.2", "10.9.0.2", 1), "none of the network's subnets")
	r.must("CreateEndpoint", chosen)
	r.must("CreateEndpoint", chosen)
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	if want := []string{"10.1.0.0/24 10.1.0.2 02:42:0a:01:00:63"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %q, want %q", asked, want)
	}
}
