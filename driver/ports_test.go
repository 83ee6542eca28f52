package driver

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/datapath"
)

// listening are the lines of held ports.
func (r *rig) listening() []string {
	var out []string
	for line := range strings.SplitSeq(r.kernel.text(), "\n") {
		if strings.HasPrefix(line, "listen ") || strings.Contains(line, "leaked") {
			out = append(out, strings.TrimPrefix(line, "listen "))
		}
	}
	slices.Sort(out)
	return out
}

func (r *rig) wantListening(want ...string) {
	r.t.Helper()
	slices.Sort(want)
	if got := r.listening(); !slices.Equal(got, want) {
		r.t.Errorf("listening on\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func newPortsRig(t *testing.T, options string) *rig {
	t.Helper()
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", options))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("Join", joinBody(net1, ep1))
	r.kernel.moveIn(veth1)
	return r
}

func TestProgram(t *testing.T) {
	r := newPortsRig(t, "")
	call := program(net1, ep1, binding(6, 80, "", 8080, 8080), binding(6, 81, "192.0.2.1", 0, 0), binding(17, 53, "127.0.0.1", 5300, 5310))
	r.must("ProgramExternalConnectivity", call)
	want := []string{"tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80", "tcp 192.0.2.1:32768 to 10.1.0.2:81", "udp 127.0.0.1:5300 to 10.1.0.2:53"}
	r.wantListening(want...)

	// The same call again keeps every port, also after a restart.
	r.must("ProgramExternalConnectivity", call)
	r.wantListening(want...)
	r.restart()
	r.wantListening(want...)
	r.must("ProgramExternalConnectivity", call)
	r.wantListening(want...)
	r.idle()

	// Another call keeps what is in both, and gives the rest back.
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080), binding(6, 82, "", 9000, 9000)))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80", "tcp 0.0.0.0:9000 to 10.1.0.2:82", "tcp [::]:9000 to 10.1.0.2:82")
	r.idle()

	r.must("RevokeExternalConnectivity", ids(net1, ep1))
	r.must("RevokeExternalConnectivity", ids(net1, ep1))
	r.wantListening()
	if strings.Contains(r.kernel.text(), "published") {
		t.Errorf("left:\n%s", r.kernel.text())
	}
	if r.kernel.made[veth1] != 1 {
		t.Errorf("the link was made %d times", r.kernel.made[veth1])
	}
}

func TestPortTaken(t *testing.T) {
	r := newPortsRig(t, "")
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	r.kernel.taken[netip.MustParseAddrPort("[::]:9000")] = true
	before := r.kernel.text()
	r.refused("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080), binding(17, 53, "", 5300, 5300), binding(6, 90, "", 9000, 9000)), "90/tcp", "9000", "in use")
	if after := r.kernel.text(); after != before {
		t.Errorf("left\n%s\nwhere there was\n%s", after, before)
	}
	r.idle()

	// A range finds the next one, for all addresses; and nothing that another
	// binding names.
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 90, "", 9000, 9002), binding(6, 91, "", 9001, 9001)))
	r.wantListening("tcp 0.0.0.0:9002 to 10.1.0.2:90", "tcp [::]:9002 to 10.1.0.2:90", "tcp 0.0.0.0:9001 to 10.1.0.2:91", "tcp [::]:9001 to 10.1.0.2:91")
	r.refused("ProgramExternalConnectivity", program(net1, ep2, binding(6, 90, "", 9001, 9002)), "90/tcp", "in use")

	// What one endpoint gives back the next can have.
	r.must("Leave", ids(net1, ep1))
	r.must("ProgramExternalConnectivity", program(net1, ep2, binding(6, 90, "", 9001, 9002)))
	r.wantListening("tcp 0.0.0.0:9001 to 10.1.0.3:90", "tcp [::]:9001 to 10.1.0.3:90")
}

// TestPublishesNothing: some engines call for networks whose containers are
// taken out by others, or not at all.
func TestPublishesNothing(t *testing.T) {
	for _, options := range []string{`{"egress":"none"}`, `{"egress":"engine"}`, `{"com.docker.network.internal":"true"}`} {
		r := newPortsRig(t, options)
		before := r.kernel.text()
		r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
		if after := r.kernel.text(); after != before {
			t.Errorf("%s: there is\n%s\nand was\n%s", options, after, before)
		}
		r.must("RevokeExternalConnectivity", ids(net1, ep1))
	}
}

func TestHairpinFlag(t *testing.T) {
	for _, c := range []struct {
		options string
		ports   []string
		want    bool
	}{
		{"", nil, false},
		{"", []string{binding(6, 80, "", 8080, 8080)}, true},
		{`{"com.docker.network.bridge.gateway_mode_ipv4":"routed"}`, []string{binding(6, 80, "", 8080, 8080)}, false},
	} {
		r := newPortsRig(t, c.options)
		r.must("ProgramExternalConnectivity", program(net1, ep1, c.ports...))
		if got := r.kernel.veths[veth1].Hairpin; got != c.want {
			t.Errorf("%s %v: hairpin %t", c.options, c.ports, got)
		}
	}
}

// TestHostAddresses is which host addresses lead to which of an endpoint's.
func TestHostAddresses(t *testing.T) {
	const v4, v6 = "10.1.0.2", "fd00:1::2"
	for _, c := range []struct {
		options, hostIP string
		addrs           string // of the endpoint
		no6to4          bool
		want            string
	}{
		{"", "", v4, false, "0.0.0.0->10.1.0.2 ::->10.1.0.2"},
		{"", "", v4, true, "0.0.0.0->10.1.0.2"},
		{"", "", v4 + " " + v6, false, "0.0.0.0->10.1.0.2 ::->fd00:1::2"},
		{"", "", v4 + " " + v6, true, "0.0.0.0->10.1.0.2"},
		{"", "::", v4 + " " + v6, true, ""},
		{"com.docker.network.bridge.gateway_mode_ipv6=routed", "", v4 + " " + v6, true, "0.0.0.0->10.1.0.2 direct->fd00:1::2"},
		{"", "", v6, false, "::->fd00:1::2"},
		{"", "", v6, true, "::->fd00:1::2"}, // engine 28 says it to the way out for IPv6 too
		{"", "0.0.0.0", v4 + " " + v6, false, "0.0.0.0->10.1.0.2"},
		{"", "::", v4 + " " + v6, false, "::->fd00:1::2"},
		{"", "::", v4, false, "::->10.1.0.2"},
		{"", "::1", v4, false, "::1->10.1.0.2"},
		{"", "::1", v4, true, ""},
		{"", "127.0.0.1", v4 + " " + v6, false, "127.0.0.1->10.1.0.2"},
		{"", "127.0.0.1", v6, false, ""},
		{"com.docker.network.bridge.host_binding_ipv4=192.0.2.1", "", v4 + " " + v6, false, "192.0.2.1->10.1.0.2"},
		{"com.docker.network.bridge.host_binding_ipv4=0.0.0.0", "", v4 + " " + v6, false, "0.0.0.0->10.1.0.2 ::->fd00:1::2"},
		{"com.docker.network.bridge.host_binding_ipv4=192.0.2.1", "0.0.0.0", v4, false, "0.0.0.0->10.1.0.2"},
		{"com.docker.network.bridge.gateway_mode_ipv4=routed", "", v4, false, "direct->10.1.0.2"},
		{"com.docker.network.bridge.gateway_mode_ipv4=routed", "", v4 + " " + v6, false, "direct->10.1.0.2 ::->fd00:1::2"},
		{"com.docker.network.bridge.gateway_mode_ipv6=routed", "", v4 + " " + v6, false, "0.0.0.0->10.1.0.2 direct->fd00:1::2"},
	} {
		n, err := bridgeCase{options: c.options, v4: true, v6: true}.network()
		if err != nil {
			t.Fatal(err)
		}
		e := Endpoint{ID: ep1}
		for a := range strings.FieldsSeq(c.addrs) {
			e.Addrs = append(e.Addrs, netip.PrefixFrom(netip.MustParseAddr(a), 24))
		}
		options := map[string]any{
			"com.docker.network.portmap": []any{map[string]any{"Proto": 6.0, "Port": 80.0, "HostIP": c.hostIP, "HostPort": 8080.0, "HostPortEnd": 8080.0}},
			optionNoProxy6To4:            c.no6to4,
		}
		wishes, err := parseWishes(n, e, options)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, w := range wishes {
			for _, target := range w.targets {
				from := "direct"
				if target.host.IsValid() {
					from = target.host.String()
				}
				got = append(got, fmt.Sprintf("%s->%s", from, target.to.Addr()))
			}
		}
		if text := strings.Join(got, " "); text != c.want {
			t.Errorf("%s -p %q for %s: %s, want %s", c.options, c.hostIP, c.addrs, text, c.want)
		}
	}
}

// TestSameNumberForBothFamilies: what is chosen freely is free for both.
func TestSameNumberForBothFamilies(t *testing.T) {
	r := newPortsRig(t, "")
	r.kernel.taken[netip.MustParseAddrPort("[::]:32768")] = true
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(132, 80, "", 0, 0)))
	r.wantListening("sctp 0.0.0.0:32769 to 10.1.0.2:80", "sctp [::]:32769 to 10.1.0.2:80")
	if len(r.kernel.elements) == 0 || !slices.ContainsFunc(r.kernel.owned().Elements, func(e datapath.Element) bool {
		return e.Set == datapath.SetPublished && e.Proto == datapath.SCTP && e.Port == 32769 && e.ToPort == 80
	}) {
		t.Errorf("not published:\n%s", r.kernel.text())
	}
}

// TestRoutedPortsAreTold: a host port that gateway mode routed does not have is said
// once for each start, and one that exists for one family is not.
func TestRoutedPortsAreTold(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"com.docker.network.bridge.gateway_mode_ipv4":"routed"}`))
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", ""))
	for network, want := range map[string][]string{
		net1: {"publish port 80/tcp: gateway mode routed has no host ports: host port 8080 leads nowhere, the container is reached at 10.1.0.2:80"},
		net2: nil,
	} {
		addr := map[string]string{net1: "10.1.0.2/24", net2: "10.2.0.2/24"}[network]
		r.must("CreateEndpoint", createEndpoint(network, ep1, addr, ""))
		r.must("Join", joinBody(network, ep1))
		r.log.Reset()
		for range 2 {
			r.must("ProgramExternalConnectivity", program(network, ep1, binding(6, 80, "", 8080, 8080), binding(17, 53, "", 0, 0)))
		}
		var said []string
		for _, e := range r.log.AllEntries() {
			if strings.HasPrefix(e.Message, "publish") {
				said = append(said, e.Message)
			}
		}
		if !slices.Equal(said, want) {
			t.Errorf("%s: said %q, want %q", addr, said, want)
		}
		r.must("Leave", ids(network, ep1))
		r.must("DeleteEndpoint", ids(network, ep1))
	}
}
