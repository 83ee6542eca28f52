package driver

import (
	"net"
	"net/netip"
	"testing"
	"time"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/plugin"
)

// TestInternalLANIsKeptIn: a container of an internal LAN network with host_access
// reaches the host and the host reaches it, but it gets by the host neither at a
// published port nor anywhere else, whatever routes it makes itself.
func TestInternalLANIsKeptIn(t *testing.T) {
	for _, internal := range []bool{false, true} {
		name := "open"
		if internal {
			name = "internal"
		}
		t.Run(name, func(t *testing.T) { internalLAN(t, internal) })
	}
}

func internalLAN(t *testing.T, internal bool) {
	t.Helper()
	netnstest.Enter(t)
	inside, other, beyond := netnstest.New(t), netnstest.New(t), netnstest.New(t)
	self(t, "link", "set", "lo", "up")
	self(t, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	self(t, "addr", "add", "10.9.0.10/24", "dev", "lan0")
	self(t, "addr", "add", "fd00:9::10/64", "dev", "lan0", "nodad")
	self(t, "link", "set", "lan0", "up")
	self(t, "link", "set", "lan1", "up")
	// As a container of the engine's is: nobody's of ours.
	self(t, "link", "add", "docker0", "type", "bridge")
	self(t, "addr", "add", "10.8.0.1/24", "dev", "docker0")
	self(t, "addr", "add", "fd00:8::1/64", "dev", "docker0", "nodad")
	self(t, "link", "set", "docker0", "up")
	self(t, "link", "add", "port0", "type", "veth", "peer", "name", "port1")
	self(t, "link", "set", "port0", "master", "docker0", "up")
	beyond.Take("port1", "eth0", netip.MustParsePrefix("10.8.0.2/24"), netip.MustParsePrefix("fd00:8::2/64"))
	beyond.Gateway(netip.MustParseAddr("10.8.0.1"))
	beyond.Gateway(netip.MustParseAddr("fd00:8::1"))

	h, ctx := newHost(t), t.Context()
	for _, c := range []wire.CreateNetworkRequest{
		{NetworkID: net1, Options: map[string]any{plugin.OptionGeneric: map[string]any{}},
			IPv4Data: []*wire.IPAMData{{Pool: "10.1.0.0/24", Gateway: "10.1.0.1/24"}}, IPv6Data: []*wire.IPAMData{{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}}},
		{NetworkID: net2, Options: map[string]any{plugin.OptionInternal: internal, plugin.OptionGeneric: map[string]any{"mode": "macvlan", "parent": "lan0", "probe": "false", "host_access": "true"}},
			IPv4Data: []*wire.IPAMData{{Pool: "10.9.0.0/24"}}, IPv6Data: []*wire.IPAMData{{Pool: "fd00:9::/64"}}},
	} {
		_, err := h.d.handleCreateNetwork(ctx, c)
		h.ok("CreateNetwork", err)
	}
	join := func(ns *netnstest.NS, network, ep, v4, v6 string) {
		t.Helper()
		_, err := h.d.handleCreateEndpoint(ctx, plugin.CreateEndpointRequest{NetworkID: network, EndpointID: ep, Interface: &wire.EndpointInterface{Address: v4, AddressIPv6: v6}})
		h.ok("CreateEndpoint", err)
		joined, err := h.d.handleJoin(ctx, plugin.JoinRequest{NetworkID: network, EndpointID: ep, SandboxKey: sandboxKey + ep})
		h.ok("Join", err)
		ns.Take(joined.InterfaceName.SrcName, "eth0", netip.MustParsePrefix(v4), netip.MustParsePrefix(v6))
	}
	join(other, net1, ep1, "10.1.0.2/24", "fd00:1::2/64")
	other.Gateway(netip.MustParseAddr("10.1.0.1"))
	other.Gateway(netip.MustParseAddr("fd00:1::1"))
	_, err := h.d.handleProgram(ctx, plugin.ProgramExternalRequest{NetworkID: net1, EndpointID: ep1, Options: realPorts})
	h.ok("Program", err)
	join(inside, net2, ep2, "10.9.0.20/24", "fd00:9::20/64")
	rec := h.d.networks[net2].rec
	for hop, at := range map[netip.Addr]string{rec.Hop4: "10.9.0.10/32", rec.Hop6: "fd00:9::10/128"} {
		inside.Exec("ip", "route", "add", single(hop).String(), "dev", "eth0")
		inside.Exec("ip", "route", "add", at, "via", hop.String())
		inside.Gateway(hop)
	}

	// listen answers connections until the test ends; nil is the host.
	listen := func(ns *netnstest.NS, at string) {
		t.Helper()
		var l net.Listener
		var err error
		do := func() { l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", at) }
		if ns == nil {
			do()
		} else {
			ns.Do(do)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.Close()
			}
		}()
	}
	listen(nil, "[::]:22")
	for _, ns := range []*netnstest.NS{inside, other, beyond} {
		listen(ns, "[::]:80")
	}
	reached := func(at string, patience time.Duration) bool {
		c, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", at)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	}
	check := func(when string) {
		t.Helper()
		for _, at := range []string{"10.9.0.10:22", "[fd00:9::10]:22"} { // and it teaches the host's neighbour
			inside.Do(func() {
				if !reached(at, 5*time.Second) {
					t.Errorf("%s: the host is not reached at %s", when, at)
				}
			})
		}
		for _, at := range []string{"10.9.0.20:80", "[fd00:9::20]:80"} {
			if !reached(at, 5*time.Second) {
				t.Errorf("%s: the host does not reach %s", when, at)
			}
		}
		want, patience := true, 5*time.Second
		if internal {
			want, patience = false, 300*time.Millisecond
		}
		for _, at := range []string{
			"10.9.0.10:8080", "[fd00:9::10]:8080", "10.1.0.1:8080", "[fd00:1::1]:8080", // published
			netip.AddrPortFrom(rec.Hop4, 8080).String(), netip.AddrPortFrom(rec.Hop6, 8080).String(),
			"10.8.0.2:80", "[fd00:8::2]:80", // forwarded
		} {
			inside.Do(func() {
				if got := reached(at, patience); got != want {
					t.Errorf("%s: from inside %s is reached: %t, want %t", when, at, got, want)
				}
			})
		}
		for _, at := range []string{"10.9.0.20:80", "[fd00:9::20]:80"} {
			beyond.Do(func() {
				if got := reached(at, patience); got != want {
					t.Errorf("%s: from a bridge %s is reached: %t, want %t", when, at, got, want)
				}
			})
		}
	}
	check("joined")
	h.restart()
	h.idle("restart")
	check("restart")
}
