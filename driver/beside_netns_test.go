package driver

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
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
	for _, onLAN := range []map[string]any{
		{"mode": "macvlan", "parent": "lan0", "probe": "false"},
		{"bridge": "br0", "probe": "false"},
	} {
		for _, lanFirst := range []bool{false, true} {
			name := "LAN connected later"
			if lanFirst {
				name = "LAN first"
			}
			if onLAN["bridge"] != nil {
				name += ", by a bridge"
			}
			t.Run(name, func(t *testing.T) { besideLAN(t, onLAN, lanFirst) })
		}
	}
}

// lanHost is a host with a card on a LAN, a client there, and a container.
type lanHost struct {
	*machine
	container, client *netnstest.NS
}

// newLANHost makes net1, a bridge, and net2, which is on the LAN.
func newLANHost(t *testing.T, onLAN map[string]any) lanHost {
	t.Helper()
	netnstest.Enter(t)
	h := lanHost{container: netnstest.New(t), client: netnstest.New(t)}
	self(t, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	card := "lan0"
	if br, ok := onLAN["bridge"].(string); ok {
		card = br
		self(t, "link", "add", br, "type", "bridge")
		self(t, "link", "set", "lan0", "master", br, "up")
		for _, f := range []string{"iptables", "ip6tables"} { // with it the answer would pass the host's table
			if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+f, []byte("0"), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	self(t, "addr", "add", "10.9.0.10/24", "dev", card)
	self(t, "addr", "add", "fd00:9::10/64", "dev", card, "nodad")
	self(t, "link", "set", card, "up")
	h.client.Take("lan1", "eth0", netip.MustParsePrefix("10.9.0.50/24"), netip.MustParsePrefix("fd00:9::50/64"))
	h.machine = newHost(t)
	for _, c := range []wire.CreateNetworkRequest{
		{NetworkID: net1, Options: map[string]any{plugin.OptionGeneric: map[string]any{}},
			IPv4Data: []*wire.IPAMData{{Pool: "10.1.0.0/24", Gateway: "10.1.0.1/24"}}, IPv6Data: []*wire.IPAMData{{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}}},
		{NetworkID: net2, Options: map[string]any{plugin.OptionGeneric: onLAN},
			IPv4Data: []*wire.IPAMData{{Pool: "10.9.0.0/24"}}, IPv6Data: []*wire.IPAMData{{Pool: "fd00:9::/64"}}},
	} {
		_, err := h.d.handleCreateNetwork(t.Context(), c)
		h.ok("CreateNetwork", err)
	}
	return h
}

// join has the engine connect the container.
func (h lanHost) join(network, ep, v4, v6, ifname string) {
	h.t.Helper()
	_, err := h.d.handleCreateEndpoint(h.t.Context(), plugin.CreateEndpointRequest{NetworkID: network, EndpointID: ep, Interface: &wire.EndpointInterface{Address: v4, AddressIPv6: v6}})
	h.ok("CreateEndpoint", err)
	joined, err := h.d.handleJoin(h.t.Context(), plugin.JoinRequest{NetworkID: network, EndpointID: ep, SandboxKey: sandboxKey})
	h.ok("Join", err)
	h.container.Take(joined.InterfaceName.SrcName, ifname, netip.MustParsePrefix(v4), netip.MustParsePrefix(v6))
}

func (h lanHost) joinLAN() {
	h.t.Helper()
	h.join(net2, ep2, "10.9.0.20/24", "fd00:9::20/64", "eth1")
}

// joinBridge makes the bridge the container's way out.
func (h lanHost) joinBridge() {
	h.t.Helper()
	h.join(net1, ep1, "10.1.0.2/24", "fd00:1::2/64", "eth0")
	h.container.Gateway(netip.MustParseAddr("10.1.0.1"))
	h.container.Gateway(netip.MustParseAddr("fd00:1::1"))
}

func (h lanHost) publish(ports map[string]any) {
	h.t.Helper()
	_, err := h.d.handleProgram(h.t.Context(), plugin.ProgramExternalRequest{NetworkID: net1, EndpointID: ep1, Options: ports})
	h.ok("Program", err)
}

func (h lanHost) leaveLAN() {
	h.t.Helper()
	_, err := h.d.handleLeave(h.t.Context(), wire.LeaveRequest{NetworkID: net2, EndpointID: ep2})
	h.ok("Leave", err)
	if out, _ := h.container.Output("ip", "-br", "link"); strings.Contains(out, "eth1") {
		h.container.Exec("ip", "link", "del", "eth1")
	}
	_, err = h.d.handleDeleteEndpoint(h.t.Context(), wire.DeleteEndpointRequest{NetworkID: net2, EndpointID: ep2})
	h.ok("DeleteEndpoint", err)
}

// serveSeen has the container take connections; want says whom it is to see when the
// client asks, from other addresses than its first if some are given.
func (h lanHost) serveSeen() (want func(v4, v6 string, from ...string)) {
	h.t.Helper()
	t, ctx := h.t, h.t.Context()
	var l net.Listener
	var err error
	h.container.Do(func() { l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", "[::]:80") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
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
	return func(v4, v6 string, from ...string) {
		t.Helper()
		for i, at := range []string{"10.9.0.10:8080", "[fd00:9::10]:8080"} {
			who := []string{v4, v6}[i]
			h.client.Do(func() {
				dialer := &net.Dialer{Timeout: 5 * time.Second}
				if len(from) > 0 {
					dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from[i])}
				}
				c, err := dialer.DialContext(ctx, "tcp", at)
				if err != nil {
					t.Errorf("%s: %v", at, err)
					return
				}
				_ = c.Close()
				if got := <-seen; !strings.HasPrefix(got, who) {
					t.Errorf("%s: the container saw %s, not %s", at, got, who)
				}
			})
		}
	}
}

func besideLAN(t *testing.T, onLAN map[string]any, lanFirst bool) {
	t.Helper()
	h := newLANHost(t, onLAN)
	if lanFirst {
		h.joinLAN()
	}
	h.joinBridge()
	h.publish(realPorts)
	want := h.serveSeen()
	if !lanFirst {
		want("10.9.0.50:", "[fd00:9::50]:")
		h.joinLAN()
	}
	h.idle("all")
	want("10.1.0.1:", "[fd00:1::1]:")
	h.restart()
	h.idle("restart")
	want("10.1.0.1:", "[fd00:1::1]:")
	h.leaveLAN()
	want("10.9.0.50:", "[fd00:9::50]:")
	h.joinLAN()
	want("10.1.0.1:", "[fd00:1::1]:")
	_, err := h.d.handleLeave(t.Context(), wire.LeaveRequest{NetworkID: net1, EndpointID: ep1})
	h.ok("Leave of the bridge", err)
	if s, err := h.kernel.Owned(t.Context()); err != nil || strings.Contains(s.String(), "beside") {
		t.Errorf("left: %s, %v", s, err)
	}
}

// TestPublishingBesideALANAfterARestart: the plugin restarts while the bridge is not
// the container's way out, and so has published nothing.
func TestPublishingBesideALANAfterARestart(t *testing.T) {
	for _, lanFirst := range []bool{false, true} {
		h := newLANHost(t, map[string]any{"mode": "macvlan", "parent": "lan0", "probe": "false"})
		if lanFirst {
			h.joinLAN()
		}
		h.joinBridge()
		if !lanFirst {
			h.joinLAN()
		}
		h.restart()
		h.idle("restart")
		h.publish(realPorts)
		h.serveSeen()("10.1.0.1:", "[fd00:1::1]:")
	}
}

// TestClientsBehindARouterOfTheLAN: whom the container reaches by a route of the LAN
// network it would answer past the host too.
func TestClientsBehindARouterOfTheLAN(t *testing.T) {
	h := newLANHost(t, map[string]any{"mode": "macvlan", "parent": "lan0", "probe": "false",
		"routes": "10.20.0.0/16 via 10.9.0.50, fd00:20::/64 via fd00:9::50"})
	for to, via := range map[string]string{"10.20.0.5/32": "10.9.0.50", "fd00:20::5/128": "fd00:9::50"} {
		h.client.Exec("ip", "addr", "add", to, "dev", "eth0", "nodad")
		self(t, "route", "add", to, "via", via)
	}
	h.joinBridge()
	h.publish(realPorts)
	h.joinLAN()
	h.container.Exec("ip", "route", "add", "10.20.0.0/16", "via", "10.9.0.50")
	h.container.Exec("ip", "route", "add", "fd00:20::/64", "via", "fd00:9::50")
	want := h.serveSeen()
	want("10.1.0.1:", "[fd00:1::1]:")
	want("10.1.0.1:", "[fd00:1::1]:", "10.20.0.5", "fd00:20::5")
}

// TestConnectingALANWhileClientsSpeak: what a client on the LAN began before goes on
// through the host, or ends at once where the container cannot take it up.
func TestConnectingALANWhileClientsSpeak(t *testing.T) {
	h := newLANHost(t, map[string]any{"mode": "macvlan", "parent": "lan0", "probe": "false"})
	h.joinBridge()
	h.publish(map[string]any{plugin.OptionPortMap: []any{
		map[string]any{"Proto": 6, "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080},
		map[string]any{"Proto": 17, "Port": 53, "HostIP": "", "HostPort": 5353, "HostPortEnd": 5353},
	}})
	ctx := t.Context()
	var l net.Listener
	var u net.PacketConn
	h.container.Do(func() {
		var err error
		if l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", "[::]:80"); err != nil {
			t.Fatal(err)
		}
		if u, err = (&net.ListenConfig{}).ListenPacket(ctx, "udp", "[::]:53"); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { _ = errors.Join(l.Close(), u.Close()) })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	go func() {
		b := make([]byte, 16)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(b[:n], from)
		}
	}()
	say := func(c net.Conn) error {
		_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	open := map[string]net.Conn{}
	for _, at := range []string{"tcp 10.9.0.10:8080", "tcp [fd00:9::10]:8080", "udp 10.9.0.10:5353", "udp [fd00:9::10]:5353"} {
		network, address, _ := strings.Cut(at, " ")
		h.client.Do(func() {
			c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, network, address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			open[at] = c
		})
		if err := say(open[at]); err != nil {
			t.Fatalf("%s: %v", at, err)
		}
	}
	h.joinLAN()
	for at, c := range open {
		var err error
		for stop := time.Now().Add(3 * time.Second); time.Now().Before(stop); { // what is forgotten is so in the background
			if err = say(c); err == nil || errors.Is(err, syscall.ECONNRESET) {
				break
			}
		}
		if strings.HasPrefix(at, "udp") && err != nil || strings.HasPrefix(at, "tcp") && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s after the LAN was connected: %v", at, err)
		}
	}
}
