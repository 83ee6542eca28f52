package driver

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/plugin"
)

// TestLANClientOfAContainerBeside: a container leaves by a bridge and has a link to a
// LAN. A client on that LAN asks the host's address at the published port, and would
// be answered by the container's own link, under an address that it never asked.
func TestLANClientOfAContainerBeside(t *testing.T) {
	for _, lanFirst := range []bool{false, true} {
		name := "LAN connected later"
		if lanFirst {
			name = "LAN first"
		}
		t.Run(name, func(t *testing.T) { besideLAN(t, lanFirst) })
	}
}

func besideLAN(t *testing.T, lanFirst bool) {
	netnstest.Enter(t)
	container, client := netnstest.New(t), netnstest.New(t)
	self(t, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	self(t, "addr", "add", "10.9.0.10/24", "dev", "lan0")
	self(t, "addr", "add", "fd00:9::10/64", "dev", "lan0", "nodad")
	self(t, "link", "set", "lan0", "up")
	client.Take("lan1", "eth0", netip.MustParsePrefix("10.9.0.50/24"), netip.MustParsePrefix("fd00:9::50/64"))
	h, ctx := newHost(t), t.Context()
	for _, c := range []wire.CreateNetworkRequest{
		{NetworkID: net1, Options: map[string]any{plugin.OptionGeneric: map[string]any{}},
			IPv4Data: []*wire.IPAMData{{Pool: "10.1.0.0/24", Gateway: "10.1.0.1/24"}}, IPv6Data: []*wire.IPAMData{{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}}},
		{NetworkID: net2, Options: map[string]any{plugin.OptionGeneric: map[string]any{"mode": "macvlan", "parent": "lan0", "probe": "false"}},
			IPv4Data: []*wire.IPAMData{{Pool: "10.9.0.0/24"}}, IPv6Data: []*wire.IPAMData{{Pool: "fd00:9::/64"}}},
	} {
		_, err := h.d.handleCreateNetwork(ctx, c)
		h.ok("CreateNetwork", err)
	}
	join := func(network, ep, v4, v6, ifname string) {
		t.Helper()
		_, err := h.d.handleCreateEndpoint(ctx, plugin.CreateEndpointRequest{NetworkID: network, EndpointID: ep, Interface: &wire.EndpointInterface{Address: v4, AddressIPv6: v6}})
		h.ok("CreateEndpoint", err)
		joined, err := h.d.handleJoin(ctx, plugin.JoinRequest{NetworkID: network, EndpointID: ep, SandboxKey: sandboxKey})
		h.ok("Join", err)
		container.Take(joined.InterfaceName.SrcName, ifname, netip.MustParsePrefix(v4), netip.MustParsePrefix(v6))
	}
	joinLAN := func() { join(net2, ep2, "10.9.0.20/24", "fd00:9::20/64", "eth1") }
	if lanFirst {
		joinLAN()
	}
	join(net1, ep1, "10.1.0.2/24", "fd00:1::2/64", "eth0")
	container.Gateway(netip.MustParseAddr("10.1.0.1"))
	container.Gateway(netip.MustParseAddr("fd00:1::1"))
	_, err := h.d.handleProgram(ctx, plugin.ProgramExternalRequest{NetworkID: net1, EndpointID: ep1, Options: realPorts})
	h.ok("Program", err)
	var l net.Listener
	container.Do(func() { l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", "[::]:80") })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	seen := make(chan string, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			seen <- c.RemoteAddr().String()
			_ = c.Close()
		}
	}()
	// ask is who the container sees.
	ask := func(from *netnstest.NS, at string) (who string) {
		t.Helper()
		from.Do(func() {
			c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", at)
			if err != nil {
				t.Errorf("%s: %v", at, err)
				return
			}
			_ = c.Close()
			who = <-seen
		})
		return who
	}
	want := func(v4, v6 string) {
		t.Helper()
		for at, who := range map[string]string{"10.9.0.10:8080": v4, "[fd00:9::10]:8080": v6} {
			if got := ask(client, at); !strings.HasPrefix(got, who) {
				t.Errorf("%s: the container saw %s, not %s", at, got, who)
			}
		}
	}
	if !lanFirst {
		want("10.9.0.50:", "[fd00:9::50]:")
		joinLAN()
	}
	h.idle("all")
	want("10.1.0.1:", "[fd00:1::1]:")
	h.restart()
	h.idle("restart")
	want("10.1.0.1:", "[fd00:1::1]:")
	_, err = h.d.handleLeave(ctx, wire.LeaveRequest{NetworkID: net2, EndpointID: ep2})
	h.ok("Leave", err)
	container.Exec("ip", "link", "del", "eth1")
	_, err = h.d.handleDeleteEndpoint(ctx, wire.DeleteEndpointRequest{NetworkID: net2, EndpointID: ep2})
	h.ok("DeleteEndpoint", err)
	want("10.9.0.50:", "[fd00:9::50]:")
	joinLAN()
	want("10.1.0.1:", "[fd00:1::1]:")
	_, err = h.d.handleLeave(ctx, wire.LeaveRequest{NetworkID: net1, EndpointID: ep1})
	h.ok("Leave of the bridge", err)
	if s, err := h.kernel.Owned(ctx); err != nil || strings.Contains(s.String(), "beside") {
		t.Errorf("left: %s, %v", s, err)
	}
}
