package driver

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/plugin"
)

// firewallBus lets everybody do everything: it is reached by this test alone.
const firewallBus = `<busconfig><type>session</type><listen>unix:path=%s</listen><policy context="default">
<allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow receive_sender="*"/></policy></busconfig>`

// firewalld is a real one in a namespace, with a bus of its own.
type firewalld struct {
	t    *testing.T
	host *netnstest.NS
	env  string
}

func newFirewalld(t *testing.T, host *netnstest.NS) *firewalld {
	t.Helper()
	if _, err := exec.LookPath("firewalld"); err != nil {
		t.Fatal("firewalld is missing: make deps installs it")
	}
	dir := t.TempDir()
	bus, conf := filepath.Join(dir, "bus"), filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, firewallBus, bus), 0o600); err != nil {
		t.Fatal(err)
	}
	f := &firewalld{t, host, "DBUS_SYSTEM_BUS_ADDRESS=unix:path=" + bus}
	host.Start("dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile")
	f.until("the bus", func() bool { _, err := os.Stat(bus); return err == nil })
	host.Start("env", f.env, "firewalld", "--nofork", "--nopid", "--system-config", filepath.Join(dir, "config"), "--log-file", filepath.Join(dir, "log"))
	f.until("firewalld", func() bool {
		out, err := host.Output("env", f.env, "firewall-cmd", "--state")
		return err == nil && strings.HasPrefix(out, "running")
	})
	return f
}

func (f *firewalld) until(what string, ok func() bool) {
	f.t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			f.t.Fatalf("%s does not start", what)
		}
	}
}

// documented runs what the documentation has people type, line by line.
func (f *firewalld) documented(after string) {
	f.t.Helper()
	page, err := os.ReadFile("../docs/firewall.md")
	if err != nil {
		f.t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(page), after)
	_, rest, begins := strings.Cut(rest, "```\n")
	block, _, ends := strings.Cut(rest, "```")
	if !found || !begins || !ends {
		f.t.Fatalf("docs/firewall.md has no commands after %q", after)
	}
	for line := range strings.Lines(block) {
		f.host.Exec("env", append([]string{f.env}, strings.Fields(line)...)...)
	}
}

// TestFirewalld: Fedora's and RHEL's firewall rejects what no zone of its own lets
// pass. Published ports are let in, because they are translated; containers get out,
// and routed networks are reached, after the lines that the documentation has.
func TestFirewalld(t *testing.T) {
	host := netnstest.Enter(t)
	bridged, routed, client := netnstest.New(t), netnstest.New(t), netnstest.New(t)
	self(t, "link", "set", "lo", "up")
	self(t, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	self(t, "addr", "add", "10.9.0.10/24", "dev", "lan0")
	self(t, "addr", "add", "fd00:9::10/64", "dev", "lan0", "nodad")
	self(t, "link", "set", "lan0", "up")
	client.Take("lan1", "eth0", netip.MustParsePrefix("10.9.0.50/24"), netip.MustParsePrefix("fd00:9::50/64"))
	client.Gateway(netip.MustParseAddr("10.9.0.10"))
	client.Gateway(netip.MustParseAddr("fd00:9::10"))
	f := newFirewalld(t, host)
	h, ctx := newHost(t), t.Context()
	for n, x := range []struct {
		network, ep, mode string
		container         *netnstest.NS
	}{{net1, ep1, "nat", bridged}, {net2, ep2, "routed", routed}} {
		v4, v6 := fmt.Sprintf("10.%d.0.", n+1), fmt.Sprintf("fd00:%d::", n+1)
		_, err := h.d.handleCreateNetwork(ctx, wire.CreateNetworkRequest{NetworkID: x.network,
			Options:  map[string]any{plugin.OptionGeneric: map[string]any{"com.docker.network.bridge.gateway_mode_ipv4": x.mode, "com.docker.network.bridge.gateway_mode_ipv6": x.mode}},
			IPv4Data: []*wire.IPAMData{{Pool: v4 + "0/24", Gateway: v4 + "1/24"}}, IPv6Data: []*wire.IPAMData{{Pool: v6 + "/64", Gateway: v6 + "1/64"}}})
		h.ok("CreateNetwork", err)
		_, err = h.d.handleCreateEndpoint(ctx, plugin.CreateEndpointRequest{NetworkID: x.network, EndpointID: x.ep,
			Interface: &wire.EndpointInterface{Address: v4 + "2/24", AddressIPv6: v6 + "2/64"}})
		h.ok("CreateEndpoint", err)
		joined, err := h.d.handleJoin(ctx, plugin.JoinRequest{NetworkID: x.network, EndpointID: x.ep, SandboxKey: sandboxKey + x.mode})
		h.ok("Join", err)
		x.container.Take(joined.InterfaceName.SrcName, "eth0", netip.MustParsePrefix(v4+"2/24"), netip.MustParsePrefix(v6+"2/64"))
		x.container.Gateway(netip.MustParseAddr(v4 + "1"))
		x.container.Gateway(netip.MustParseAddr(v6 + "1"))
		ports := map[string]any{plugin.OptionPortMap: []any{map[string]any{"Proto": 6, "Port": 80, "HostIP": "", "HostPort": 8080 + n, "HostPortEnd": 8080 + n}}}
		_, err = h.d.handleProgram(ctx, plugin.ProgramExternalRequest{NetworkID: x.network, EndpointID: x.ep, Options: ports})
		h.ok("Program", err)
	}
	for _, ns := range []*netnstest.NS{bridged, routed, client} {
		ns.Do(func() {
			l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "[::]:80")
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
		})
	}
	// ask has connections tried, and compares which come about.
	ask := func(when string, reached bool, tries ...func() (*netnstest.NS, string)) {
		t.Helper()
		for _, x := range tries {
			from, at := x()
			from.Do(func() {
				c, err := (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, "tcp", at)
				if err == nil {
					_ = c.Close()
				}
				if reached != (err == nil) {
					t.Errorf("%s, %s: reached %t, not %t: %v", when, at, err == nil, reached, err)
				}
			})
		}
	}
	try := func(from *netnstest.NS, at string) func() (*netnstest.NS, string) {
		return func() (*netnstest.NS, string) { return from, at }
	}
	published := []func() (*netnstest.NS, string){try(client, "10.9.0.10:8080"), try(client, "[fd00:9::10]:8080")}
	out := []func() (*netnstest.NS, string){try(bridged, "10.9.0.50:80"), try(bridged, "[fd00:9::50]:80"), try(routed, "10.9.0.50:80")}
	in := []func() (*netnstest.NS, string){try(client, "10.2.0.2:80"), try(client, "[fd00:2::2]:80")}
	words := strings.Fields(host.Exec("ip", "-o", "-6", "addr", "show", "dev", "lan0", "scope", "link"))
	linkLocal, _, _ := strings.Cut(words[slices.Index(words, "inet6")+1], "/")
	proxied := try(client, "["+linkLocal+"%eth0]:8080")
	ask("default zone, published", true, published...)
	ask("default zone, through the plugin", false, proxied)
	ask("default zone, egress", false, out...)
	ask("default zone, routed", false, in...)
	f.documented("## firewalld")
	h.idle("firewalld was reloaded")
	ask("documented, published", true, published...)
	ask("documented, egress", true, out...)
	ask("documented, routed", true, in...)
	host.Exec("env", f.env, "firewall-cmd", "--add-port=8080/tcp")
	ask("open to the host, through the plugin", true, proxied)
}
