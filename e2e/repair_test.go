//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// repairTime is one period of the plugin's own check and what it takes.
const repairTime = 35 * time.Second

// TestRepair does what other programs do to a host and waits for one period.
func TestRepair(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.oursNetwork(t, "net1", "--subnet", net1, "--ipv6", "--subnet", net1v6)
	e.oursNetwork(t, "net2", "--subnet", net2)
	e.run(t, "alpha", "--network", "net1", "-p", "8080:80")
	e.run(t, "beta", "--network", "net1")
	e.run(t, "other", "--network", "net2", "-p", "8090:80")
	e.sees(t, e.lan.client, host4+":8080", client4)
	s, err := e.status(t)
	if err != nil {
		t.Fatal(err)
	}
	var port, bridge string
	for _, n := range s.Networks {
		if n.Subnets[0].Pool == net1 {
			bridge = n.Link
		}
	}
	for _, x := range s.Endpoints {
		if strings.HasPrefix(x.Addresses[0], "10.202.") {
			port = x.Link
		}
	}
	// A firewall that is flushed is there again at once: nftables tells.
	e.net(t, "nft", "flush", "table", "inet", "weft")
	flushed := time.Now()
	eventually(t, 5*time.Second, "the rules are back", func() error {
		if !strings.Contains(e.net(t, "nft", "list", "table", "inet", "weft"), "goto to_bridge") {
			return errors.New("they are not")
		}
		return nil
	})
	note("flushed table: rules back after %v", time.Since(flushed).Round(10*time.Millisecond))
	damaged := time.Now().Truncate(time.Second).Add(time.Second) // the log knows whole seconds
	time.Sleep(time.Until(damaged))                              // a pass may come between what follows
	e.net(t, "nft", "flush", "table", "inet", "weft")
	e.net(t, "ip", "link", "del", bridge)
	e.net(t, "ip", "link", "set", port, "nomaster")
	e.net(t, "iptables", "-D", "FORWARD", e.hookNumber(t))
	// As sysctl --system does on hosts whose files say so.
	e.net(t, "sh", "-c", "cd /proc/sys/net && echo 0 >ipv4/ip_forward && echo 0 >ipv6/conf/all/forwarding && echo 1 >ipv4/conf/all/rp_filter && "+
		"for f in ipv4/conf/*/route_localnet; do echo 0 >$f; done")
	e.works(t, repairTime, host4+":8080")
	e.works(t, repairTime, host4+":8090")
	e.works(t, repairTime, "["+host6+"]:8080")
	note("flushed table, deleted bridge, pulled port, deleted hook: all well after %v", time.Since(damaged).Round(time.Second))
	for who, to := range map[string]string{"alpha": client4 + ":7000", "other": client4 + ":7000", "beta": "alpha:80"} {
		e.lan.client.serveOnce(t)
		c, err := e.in(who, "/probe", "dial", "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := output(c); err != nil || strings.Contains(out, `"err"`) {
			t.Errorf("%s to %s: %s %v", who, to, out, err)
		}
	}
	e.checkAgrees(t)
	e.checkLog(t, damaged, bridge, port, "table", "FORWARD")

	// Nothing is to be said again in the next period.
	before := len(e.repairLines(t, damaged))
	time.Sleep(32 * time.Second)
	if after := e.repairLines(t, damaged); len(after) != before {
		t.Errorf("said again: %q", after[before:])
	}
	e.removeAll(t)
	e.checkClean(t)
}

// hookNumber is the position of our rule in FORWARD.
func (e *engine) hookNumber(tb testing.TB) string {
	tb.Helper()
	n := 0
	for l := range strings.SplitSeq(e.net(tb, "iptables", "-S", "FORWARD"), "\n") {
		if !strings.HasPrefix(l, "-A") {
			continue
		}
		n++
		if strings.Contains(l, "weft") {
			return fmt.Sprint(n)
		}
	}
	tb.Fatal("there is no hook in FORWARD")
	return ""
}

// works waits until a published port answers the client.
func (e *engine) works(tb testing.TB, limit time.Duration, to string) {
	tb.Helper()
	eventually(tb, limit, to, func() error {
		out, err := output(e.lan.client.inNet(suite.probe, "dial", "-timeout", "500ms", "tcp", to))
		if err == nil && strings.Contains(out, `"err"`) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}

// serveOnce starts the client's server if there is none yet.
func (m *machine) serveOnce(tb testing.TB) {
	tb.Helper()
	if out, err := output(m.inNet(suite.probe, "free", "tcp", ":7000")); err == nil && out == "" {
		m.serve(tb, "tcp:7000", "udp:7000")
	}
}

// repairLines are the plugin's lines about repairs since then.
func (e *engine) repairLines(tb testing.TB, since time.Time) []string {
	tb.Helper()
	var lines []string
	for _, l := range e.pluginLog(tb) {
		if !strings.Contains(l, "repaired: ") {
			continue
		}
		stamp, _, _ := strings.Cut(strings.TrimPrefix(l, `time="`), `"`)
		if at, err := time.Parse(time.RFC3339Nano, stamp); err == nil && at.Before(since) {
			continue
		}
		lines = append(lines, l)
	}
	return lines
}

// checkLog fails unless each thing was said, and nothing twice.
func (e *engine) checkLog(tb testing.TB, since time.Time, things ...string) {
	tb.Helper()
	lines := e.repairLines(tb, since)
	seen := map[string]int{}
	for _, l := range lines {
		_, what, _ := strings.Cut(l, "repaired: ")
		seen[what]++
		if seen[what] == 2 {
			tb.Errorf("said twice: %s", l)
		}
	}
	for _, x := range things {
		if !strings.Contains(strings.Join(lines, "\n"), x) {
			tb.Errorf("no line says that %s was repaired:\n%s", x, strings.Join(lines, "\n"))
		}
	}
}

// TestExistingBridge attaches networks to a bridge of the host and compares
// it before, meanwhile and afterwards.
func TestExistingBridge(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	// As LANs are bridged on real hosts: the bridge has the NIC as a port, the
	// host's address, and the MAC address of its lowest port.
	nic := newMachine(t, "printer", "")
	e.net(t, "ip", "link", "add", "br0", "type", "bridge")
	e.net(t, "ip", "link", "add", "nic0", "address", "f8:ff:ff:00:00:01", "type", "veth", "peer", "name", "lan0", "netns", nic.pid())
	e.net(t, "ip", "link", "set", "nic0", "master", "br0", "up")
	e.net(t, "ip", "link", "set", "br0", "up")
	e.net(t, "ip", "addr", "add", "10.210.0.1/24", "dev", "br0")
	nic.net(t, "ip", "addr", "add", "10.210.0.9/24", "dev", "lan0")
	nic.net(t, "ip", "link", "set", "lan0", "up")
	nic.serve(t, "tcp:7000")
	time.Sleep(2 * time.Second) // IPv6 addresses of the kernel's own are settled
	before := e.snapshot(t, "br0")

	e.oursNetwork(t, "lan", "--subnet", "10.210.0.0/24", "--gateway", "10.210.0.1", "--ip-range", "10.210.0.128/25", "-o", "bridge=br0")
	e.run(t, "alpha", "--network", "lan", "-p", "8080:80")
	e.run(t, "beta", "--network", "lan")
	for who, to := range map[string]string{"alpha": "10.210.0.9:7000", "beta": "alpha:80"} {
		c, err := e.in(who, "/probe", "dial", "-wait", "3s", "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := output(c); err != nil || strings.Contains(out, `"err"`) {
			t.Errorf("%s to %s: %s %v", who, to, out, err)
		}
	}
	addr := e.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.lan.IPAddress}}", "alpha")
	e.sees(t, nic, addr+":80", "alpha")
	e.sees(t, e.lan.client, host4+":8080", "alpha")
	if during := e.snapshot(t, "br0"); during != before {
		t.Errorf("the bridge changed:\nbefore %s\nduring %s", before, during)
	}
	e.removeAll(t)
	if after := e.snapshot(t, "br0"); after != before {
		t.Errorf("the bridge changed:\nbefore %s\nafter  %s", before, after)
	}
	e.checkClean(t)
	if out, err := e.docker("network", "create", "-d", ours, "-o", "bridge=br7", "refused"); err == nil {
		t.Error("a bridge that does not exist was accepted")
	} else if !strings.Contains(err.Error(), "br7") {
		t.Errorf("the error does not name the bridge: %v %s", err, out)
	}
}

// snapshot is all that the kernel says of a link, without timers and counters.
func (e *engine) snapshot(tb testing.TB, name string) string {
	tb.Helper()
	var all string
	for _, kind := range []string{"link", "addr"} {
		var l []map[string]any
		if err := json.Unmarshal([]byte(e.net(tb, "ip", "-d", "-j", kind, "show", "dev", name)), &l); err != nil {
			tb.Fatal(err)
		}
		if info, ok := l[0]["linkinfo"].(map[string]any); ok {
			if data, ok := info["info_data"].(map[string]any); ok {
				for k := range data {
					if strings.HasSuffix(k, "_timer") {
						delete(data, k)
					}
				}
			}
		}
		b, err := json.Marshal(l)
		if err != nil {
			tb.Fatal(err)
		}
		all += string(b)
	}
	return all
}

// TestWithoutIptables is an engine that leaves the firewall alone.
func TestWithoutIptables(t *testing.T) {
	t.Parallel()
	e := newEngine(t, map[string]any{"iptables": false, "ip6tables": false, "ip-forward": false, "bridge": "none"})
	e.installPlugin(t)
	e.lan.client.serve(t, "tcp:7000")
	// A second LAN on the same host: switching forwarding on for containers
	// must not make the host a router between the two.
	far := newMachine(t, "far", "")
	e.net(t, "ip", "link", "add", "lan1", "type", "veth", "peer", "name", "lan0", "netns", far.pid())
	e.net(t, "ip", "link", "set", "lan1", "up")
	e.net(t, "ip", "addr", "add", "203.0.113.1/24", "dev", "lan1")
	far.net(t, "ip", "addr", "add", "203.0.113.9/24", "dev", "lan0")
	far.net(t, "ip", "link", "set", "lan0", "up")
	far.net(t, "ip", "route", "add", "default", "via", "203.0.113.1")
	far.serve(t, "tcp:7000")
	e.lan.client.net(t, "ip", "route", "add", "203.0.113.0/24", "via", host4)

	e.oursNetwork(t, "net1", "--subnet", net1)
	e.oursNetwork(t, "net2", "--subnet", net2)
	e.run(t, "alpha", "--network", "net1", "-p", "8080:80")
	e.run(t, "other", "--network", "net2")
	w := newWorld(t, e, ours)
	w.boxes = []string{"alpha", "other"}
	w.look()
	w.learn("far", "203.0.113.9")
	w.learn("gw.net1", "10.201.0.1")
	for _, p := range []probe{
		{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
		{name: "published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
		{name: "published, from the host", ask: dial("host", "tcp", "lo:8080"), want: "alpha sees gw.net1"},
		{name: "published, from another network", ask: dial("other", "tcp", "host:8080"), want: "alpha sees other"},
		{name: "to another network", ask: dial("alpha", "tcp", "other:80"), want: "timeout"},
		{name: "from outside", ask: dial("client", "tcp", "alpha:80"), want: "timeout"},
		{name: "from one LAN to the other", ask: dial("client", "tcp", "far:7000"), want: "timeout"},
	} {
		if got := p.ask(w); got != p.want {
			t.Errorf("%s: %q, want %q", p.name, got, p.want)
		}
	}
	e.removeAll(t)
	e.checkClean(t)
}

// TestLegacyIptables is an engine that uses the older variant of iptables.
func TestLegacyIptables(t *testing.T) {
	t.Parallel()
	e := newEngineWith(t, nil, func(e *engine) { e.path = legacyPrograms(t) })
	rules := e.net(t, "iptables-legacy", "-S", "FORWARD")
	if !strings.Contains(rules, "DOCKER-USER") {
		t.Fatalf("the engine did not use iptables-legacy:\n%s", rules)
	}
	e.installPlugin(t)
	e.lan.client.serve(t, "tcp:7000")
	e.oursNetwork(t, "net1", "--subnet", net1)
	e.run(t, "alpha", "--network", "net1", "-p", "8080:80")
	e.sees(t, e.lan.client, host4+":8080", client4)
	c, err := e.in("alpha", "/probe", "dial", "tcp", client4+":7000")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := output(c); err != nil || !strings.Contains(out, host4) {
		t.Errorf("to outside: %s %v", out, err)
	}
	if n := strings.Count(e.net(t, "iptables-legacy", "-S"), "weft"); n != 1 {
		t.Errorf("%d rules of ours in iptables-legacy, want 1", n)
	}
	e.removeAll(t)
	e.checkClean(t)
}

// legacyPrograms makes a directory where iptables is the legacy variant.
func legacyPrograms(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp(suite.dir, "legacy") //nolint:usetesting // machines with another root see suite.dir only
	if err != nil {
		tb.Fatal(err)
	}
	for _, n := range []string{"iptables", "ip6tables", "iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore"} {
		if err := os.Symlink("/usr/sbin/xtables-legacy-multi", filepath.Join(dir, n)); err != nil {
			tb.Fatal(err)
		}
	}
	return dir
}

// TestHalvesApart uses our network driver with the engine's addresses, and
// our addresses with the engine's bridge.
func TestHalvesApart(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.must(t, "network", "create", "-d", ours, "driveronly")
	e.must(t, "network", "create", "-d", builtin, "--ipam-driver", ours, "ipamonly")
	e.run(t, "alpha", "--network", "driveronly", "-p", "8080:80")
	e.run(t, "beta", "--network", "ipamonly", "-p", "8090:80")
	e.sees(t, e.lan.client, host4+":8080", "alpha")
	e.sees(t, e.lan.client, host4+":8090", "beta")
	e.removeAll(t)
	e.must(t, "network", "rm", "ipamonly")
	e.checkClean(t)
}

// TestStart measures how long the plugin takes to be there, and reads the
// errors of the commonest mistakes.
func TestStart(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	needPlugin(t)
	e.must(t, "plugin", "create", pluginName, suite.bundle)
	start := time.Now()
	e.must(t, "plugin", "enable", pluginName)
	took := time.Since(start)
	note("plugin enable: %v", took.Round(10*time.Millisecond))
	if took > 3*time.Second*suite.slow {
		t.Errorf("enable took %v: the engine had to dial twice", took)
	}
	e.waitPlugin(t)
	status, err := output(e.inside("cat", "/proc/"+e.pluginPID(t)+"/status"))
	if err != nil {
		t.Fatal(err)
	}
	// Without SYS_ADMIN: DAC_OVERRIDE, NET_BIND_SERVICE, NET_ADMIN, NET_RAW.
	for _, want := range []string{"CapBnd:\t0000000000003402", "CapPrm:\t0000000000003402", "NoNewPrivs:\t1"} {
		if !strings.Contains(status, want) {
			t.Errorf("the plugin's privileges: no %q in\n%s", want, status)
		}
	}
	for args, words := range map[string][]string{
		"-o com.docker.network.bridge.enable_ic=false": {"enable_ic", "enable_icc"},
		"-o mode=brigde":  {"brigde", "bridge"},
		"-o mtu=many":     {"mtu", "many"},
		"--ipam-opt x=y":  {"x"},
		"-o bridge=nobr0": {"nobr0"},
	} {
		all := append([]string{"network", "create", "-d", ours, "--ipam-driver", ours}, strings.Fields(args)...)
		_, err := e.docker(append(all, "refused")...)
		if err == nil {
			t.Errorf("%s was accepted", args)
			e.must(t, "network", "rm", "refused")
			continue
		}
		for _, w := range words {
			if !strings.Contains(lastLine(err), w) {
				t.Errorf("%s: the error does not say %q: %s", args, w, lastLine(err))
			}
		}
	}
	manyPorts(t, e)
	checkDefaultRoutes(t, e)
	e.checkClean(t)
}
