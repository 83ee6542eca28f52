package driver

import (
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/plugin"
	"github.com/weftnet/weft/internal/store"
)

// machine is a driver on a real kernel. Everything runs on the test's goroutine,
// which is in the namespace.
type machine struct {
	t         *testing.T
	d         *Driver
	kernel    *datapath.Kernel
	nets, eps *store.Bolt
}

func newHost(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	h := &machine{t: t, nets: openStore(t, filepath.Join(dir, "weft.db")), eps: openStore(t, filepath.Join(dir, "run.db"))}
	h.start()
	t.Cleanup(func() { h.kernel.Close() })
	return h
}

func (h *machine) start() {
	h.t.Helper()
	k, err := datapath.New(datapath.Config{Log: quiet()})
	if err != nil {
		h.t.Fatal(err)
	}
	h.kernel = k
	h.d, err = New(Config{Networks: h.nets, Endpoints: h.eps, Kernel: k, Backends: allBackends(), Host: k, Log: quiet()})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.d.Recover(h.t.Context()); err != nil {
		h.t.Fatal("recover:", err)
	}
}

func (h *machine) restart() {
	h.t.Helper()
	h.kernel.Close()
	h.start()
}

// idle is the invariant of every test: after any request repair changes
// nothing.
func (h *machine) idle(after string) {
	h.t.Helper()
	lines, err := h.d.Reconcile(h.t.Context())
	if err != nil || len(lines) > 0 {
		h.t.Errorf("after %s, reconcile: %q, %v", after, lines, err)
	}
}

func (h *machine) ok(what string, err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("%s: %v", what, err)
	}
	h.idle(what)
}

var realPorts = map[string]any{plugin.OptionPortMap: []any{
	map[string]any{"Proto": 6, "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080},
	map[string]any{"Proto": 17, "Port": 53, "HostIP": "127.0.0.1", "HostPort": 0, "HostPortEnd": 0},
}}

// TestRealKernel is a container's life, with a restart of the plugin after
// each call, and a connection through the published port.
func TestRealKernel(t *testing.T) {
	for _, c := range []struct {
		name    string
		generic map[string]any
		foreign string
	}{
		{name: "default"},
		{name: "no icc", generic: map[string]any{"com.docker.network.bridge.enable_icc": "false"}},
		{name: "routed", generic: map[string]any{"com.docker.network.bridge.gateway_mode_ipv4": "routed", "com.docker.network.bridge.gateway_mode_ipv6": "routed"}},
		{name: "all elements", generic: map[string]any{"com.docker.network.bridge.gateway_mode_ipv4": "nat-unprotected", "com.docker.network.host_ipv6": "2001:db8::9",
			"com.docker.network.bridge.trusted_host_interfaces": "lo", "com.docker.network.bridge.name": "lan7", "mtu": "1400"}},
		{name: "egress none", generic: map[string]any{"egress": "none"}},
		{name: "existing", generic: map[string]any{"bridge": "br0"}, foreign: "br0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			netnstest.Enter(t)
			realLife(t, c.generic, c.foreign)
		})
	}
}

// TestLANRealKernel is the same life on a parent.
func TestLANRealKernel(t *testing.T) {
	for _, c := range []struct {
		name  string
		needs []string
		// options are key=value.
		options string
	}{
		{"macvlan", nil, "mode=macvlan parent=lan0 host_access=true"},
		{"macvlan, ports", nil, "mode=macvlan parent=lan0 probe=false"},
		{"macvlan, internal", nil, "mode=macvlan parent=lan0 egress=none"},
		{"ipvlan", []string{"ipvlan"}, "mode=ipvlan parent=lan0 host_access=true"},
		{"ipvlan l3", []string{"ipvlan"}, "mode=ipvlan parent=lan0 ipvlan_mode=l3 host_access=true"},
		{"VLAN", []string{"vlan"}, "mode=macvlan parent=lan0.10 host_access=true"},
		{"QinQ", []string{"vlan", "ipvlan"}, "mode=ipvlan parent=lan0.10.20 host_access=true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, kind := range c.needs {
				netnstest.Needs(t, kind)
			}
			netnstest.Enter(t)
			self(t, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
			self(t, "addr", "add", "10.1.0.10/24", "dev", "lan0")
			self(t, "link", "set", "lan0", "up")
			self(t, "link", "set", "lan1", "up")
			generic := map[string]any{}
			for o := range strings.FieldsSeq(c.options) {
				k, v, _ := strings.Cut(o, "=")
				generic[k] = v
			}
			realLife(t, generic, "")
			self(t, "link", "show", "lan0")
		})
	}
}

func realLife(t *testing.T, generic map[string]any, foreign string) {
	t.Helper()
	here := netnstest.New(t) // the container
	if foreign != "" {
		self(t, "link", "add", foreign, "type", "bridge")
		self(t, "link", "set", foreign, "up")
		self(t, "addr", "add", "10.1.0.1/24", "dev", foreign)
	}
	h := newHost(t)
	ctx := t.Context()
	_, err := h.d.handleCreateNetwork(ctx, wire.CreateNetworkRequest{
		NetworkID: net1, Options: map[string]any{plugin.OptionGeneric: generic},
		IPv4Data: []*wire.IPAMData{{Pool: "10.1.0.0/24", Gateway: "10.1.0.1/24"}},
		IPv6Data: []*wire.IPAMData{{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}},
	})
	h.ok("CreateNetwork", err)
	_, err = h.d.handleCreateEndpoint(ctx, plugin.CreateEndpointRequest{NetworkID: net1, EndpointID: ep1,
		Interface: &wire.EndpointInterface{Address: "10.1.0.2/24", AddressIPv6: "fd00:1::2/64"}})
	h.ok("CreateEndpoint", err)
	h.restart()
	h.idle("restart after CreateEndpoint")
	joined, err := h.d.handleJoin(ctx, plugin.JoinRequest{NetworkID: net1, EndpointID: ep1, Options: realPorts})
	h.ok("Join", err)
	here.Take(joined.InterfaceName.SrcName, "eth0", netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("fd00:1::2/64"))
	h.idle("the engine's move")
	_, err = h.d.handleProgram(ctx, plugin.ProgramExternalRequest{NetworkID: net1, EndpointID: ep1, Options: realPorts})
	h.ok("Program", err)
	h.restart()
	h.idle("restart after Program")
	if joined.Gateway != "" && generic == nil {
		here.Gateway(netip.MustParseAddr(joined.Gateway))
		serve(t, here)
	}
	_, err = h.d.handleProgram(ctx, plugin.ProgramExternalRequest{NetworkID: net1, EndpointID: ep1, Options: realPorts})
	h.ok("Program again", err)
	_, err = h.d.handleRevoke(ctx, wire.RevokeExternalConnectivityRequest{NetworkID: net1, EndpointID: ep1})
	h.ok("Revoke", err)
	_, err = h.d.handleProgram(ctx, plugin.ProgramExternalRequest{NetworkID: net1, EndpointID: ep1, Options: realPorts})
	h.ok("Program after Revoke", err)
	_, err = h.d.handleLeave(ctx, wire.LeaveRequest{NetworkID: net1, EndpointID: ep1})
	h.ok("Leave", err)
	if generic["parent"] != nil {
		here.Return("eth0", joined.InterfaceName.SrcName)
		h.idle("the engine's move back")
	}
	if out, err := here.Output("ip", "-br", "link"); err != nil || strings.Contains(out, "eth0") {
		t.Errorf("after Leave the container has %s, %v", out, err)
	}
	_, err = h.d.handleDeleteEndpoint(ctx, wire.DeleteEndpointRequest{NetworkID: net1, EndpointID: ep1})
	h.ok("DeleteEndpoint", err)
	h.restart()
	h.idle("restart after DeleteEndpoint")
	_, err = h.d.handleDeleteNetwork(ctx, wire.DeleteNetworkRequest{NetworkID: net1})
	h.ok("DeleteNetwork", err)
	left, err := h.kernel.Owned(ctx)
	left.Forward4, left.Forward6 = false, false
	if err != nil || !left.Empty() {
		t.Errorf("left: %s, %v", left, err)
	}
}

// self runs ip in the goroutine's own namespace.
func self(t *testing.T, arg ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "ip", arg...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", arg, err, out)
	}
}

// serve connects through the published port from the host itself. Not from
// [::1]: the proxy's goroutines are not in the test's namespace.
func serve(t *testing.T, container *netnstest.NS) {
	t.Helper()
	var l net.Listener
	container.Do(func() {
		var err error
		if l, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", "[::]:80"); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { _ = l.Close() }()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello from "+c.RemoteAddr().String())
			_ = c.Close()
		}
	}()
	for _, at := range []string{"127.0.0.1:8080", "10.1.0.1:8080", "[fd00:1::1]:8080"} {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", at)
		if err != nil {
			t.Errorf("%s: %v", at, err)
			continue
		}
		b, err := io.ReadAll(c)
		if err != nil || !strings.Contains(string(b), "10.1.0.1") && !strings.Contains(string(b), "[fd00:1::1]") {
			t.Errorf("%s answered %q, %v", at, b, err)
		}
		_ = c.Close()
	}
}
