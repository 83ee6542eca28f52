//go:build e2e

package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestExamplesStay makes the containers of the examples about lasting addresses
// again in every way that there is, and looks at their addresses.
func TestExamplesStay(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	for name, cmd := range standIns {
		e.must(t, "import", "--change", cmd, suite.image, name)
	}
	s := e.lan.dhcpHost(t)
	projects := []string{"dhcp", "reservations"}
	compose := func(args ...string) {
		t.Helper()
		for _, p := range projects {
			if err := e.compose(nil, filepath.Join("../examples", p+".yaml"), p, args...); err != nil {
				t.Fatal(err)
			}
		}
	}
	recreate := func() {
		t.Helper()
		if suite.version.major < 28 {
			compose("up", "-d", "--force-recreate")
			return
		}
		// Debian's Compose cannot on these engines: it dies of the images' missing
		// ContainerConfig.
		compose("rm", "-s", "-f")
		compose("up", "-d")
	}
	compose("up", "-d")
	web, db := e.placeOf(t, "web", "dhcp_lan"), e.placeOf(t, "db", "reservations_lab")
	if mac := s.leases(t)[web.IPAddress]; mac != web.MacAddress {
		t.Errorf("web has %+v, the server knows %q", web, mac)
	}
	if db.IPAddress != "10.45.0.20" || db.MacAddress != "02:00:0a:2d:00:14" {
		t.Errorf("db has %+v", db)
	}
	again := func(what string) {
		t.Helper()
		if now := e.placeOf(t, "web", "dhcp_lan"); now != web {
			t.Errorf("%s: web has %+v, before %+v", what, now, web)
		}
		if now := e.placeOf(t, "db", "reservations_lab"); now != db {
			t.Errorf("%s: db has %+v, before %+v", what, now, db)
		}
		s.has(t, web.IPAddress)
		for _, m := range []*machine{e.lan.client, e.machine} {
			if out, err := output(m.inNet(suite.probe, "dial", "-timeout", "1500ms", "-wait", "5s", "tcp", web.IPAddress+":80")); err != nil {
				t.Errorf("%s: web from %s: %s %v", what, m.name, out, err)
			}
		}
		e.checkAgrees(t)
	}
	again("started")
	recreate()
	again("recreated")
	e.killPlugin(t)
	e.waitPlugin(t)
	again("plugin killed")
	time.Sleep(time.Second) // the engine registers it again
	recreate()
	again("plugin killed, recreated")
	e.kill(t)
	e.start(t)
	e.waitPlugin(t)
	compose("up", "-d")
	again("engine killed")
	e.reboot(t)
	e.waitPlugin(t)
	compose("up", "-d")
	again("host rebooted")
	compose("down")
	s.has(t)
	e.checkClean(t)
}

// TestNames has an engine that does not say which container an address is for:
// what is reserved is there for who asks for it.
func TestNames(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.oursNetwork(t, "net1", "--subnet", net1, "--ipam-opt", "reserve.db=10.201.0.2,02:00:00:00:00:02")
	says := func(want string, args ...string) {
		t.Helper()
		out, err := e.weft(t, append([]string{"address"}, args...)...)
		if err != nil {
			out = err.Error()
		}
		if !strings.Contains(out, want) {
			t.Errorf("weft address %s: %q, want something with %q", strings.Join(args, " "), out, want)
		}
	}
	has := func(name, address, mac string, args ...string) {
		t.Helper()
		e.run(t, name, append([]string{"--network", "net1"}, args...)...)
		if p := e.placeOf(t, name, "net1"); p.IPAddress != address || mac != "" && p.MacAddress != mac {
			t.Errorf("%s has %+v, want %s %s", name, p, address, mac)
		}
		e.sees(t, e.machine, address+":80", name)
	}
	has("web", "10.201.0.3", "") // passes what is reserved over
	has("db", "10.201.0.2", "02:00:00:00:00:02", "--ip", "10.201.0.2")
	e.must(t, "rm", "-f", "web", "db")
	has("web", "10.201.0.3", "")
	has("db", "10.201.0.2", "02:00:00:00:00:02", "--ip", "10.201.0.2")

	says("10.201.0.30,02:00:00:00:00:30 of pool "+net1+" is reserved for nas", "reserve", "nas", "10.201.0.30", "02:00:00:00:00:30")
	has("nas", "10.201.0.30", "02:00:00:00:00:30", "--ip", "10.201.0.30")
	says("disconnect its container", "release", "10.201.0.30")
	says("is the gateway", "release", "10.201.0.1")
	says("reserve.db", "forget", "db")
	e.killPlugin(t)
	e.waitPlugin(t)
	time.Sleep(time.Second) // the engine registers it again
	e.must(t, "restart", "-t", "0", "nas")
	if p := e.placeOf(t, "nas", "net1"); p.MacAddress != "02:00:00:00:00:30" {
		t.Errorf("restarted after a kill: nas has %+v", p)
	}
	says("nothing is kept for nas", "forget", "nas")
	out, err := e.weft(t, "status", "pools")
	if err != nil || !strings.Contains(out, "10.201.0.2") || !strings.Contains(out, "reserved, in use") || strings.Contains(out, "nas") {
		t.Errorf("weft status pools: %s %v", out, err)
	}

	// Of three addresses two rest: the one that was released first is next.
	e.oursNetwork(t, "tight", "--subnet", "10.202.0.0/29", "--ip-range", "10.202.0.4/30", "--gateway", "10.202.0.1", "--ipam-opt", "quarantine=1h")
	for _, name := range []string{"four", "five", "six"} {
		e.run(t, name, "--network", "tight")
	}
	e.must(t, "rm", "-f", "five")
	e.must(t, "rm", "-f", "four")
	e.run(t, "next", "--network", "tight")
	if a := e.address(t, "next", "tight"); a != "10.202.0.5" {
		t.Errorf("of 10.202.0.5, and then .4, which were released, %s is given out first", a)
	}

	const why = "this engine does not say which container an address is for"
	if n := strings.Count(strings.Join(e.pluginLog(t), "\n"), why); n != 1 {
		t.Errorf("the log says %d times why names are not known, want once", n)
	}
	e.removeAll(t)
	e.checkClean(t)
}

// TestLeaseKilled kills the plugin between what it and the DHCP server tell each
// other.
func TestLeaseKilled(t *testing.T) {
	t.Parallel()
	e := newLANWorld(t).e
	s := e.lan.dhcpHost(t)
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "-o", "probe=false")...)
	t.Run("before the answer", func(t *testing.T) { leaseCutOff(t, e, s) })
	t.Run("at any moment", func(t *testing.T) { leaseUnderLoad(t, e, s) })
	e.removeAll(t)
	e.checkClean(t)
}

// leaseCutOff keeps the server's last word from the plugin, which dies waiting.
func leaseCutOff(t *testing.T, e *engine, s *dnsmasq) {
	t.Helper()
	// The message's type is the first option: byte 250 after the UDP header's begin.
	e.lan.client.net(t, "nft", "add table ip hold; add chain ip hold out { type filter hook output priority 0; }; add rule ip hold out udp sport 67 @th,2000,8 5 drop")
	failed := make(chan error, 1)
	go func() { failed <- e.tryRun("alpha", "--network", "lan") }()
	eventually(t, 8*time.Second, "the server has granted it", func() error {
		if n := len(s.leases(t)); n != 1 {
			return fmt.Errorf("%d leases", n)
		}
		return nil
	})
	granted := s.leases(t)
	e.killPlugin(t)
	if err := <-failed; err == nil || !cutOff(err) {
		t.Errorf("a container started although the plugin was killed: %s", lastLine(err))
	}
	e.lan.client.net(t, "nft", "delete", "table", "ip", "hold")
	e.waitPlugin(t)
	time.Sleep(time.Second) // the engine registers it again
	e.must(t, "start", "alpha")
	p := e.placeOf(t, "alpha", "lan")
	if granted[p.IPAddress] != p.MacAddress {
		t.Errorf("alpha has %+v, which is not what the server had granted: %v", p, granted)
	}
	s.has(t, p.IPAddress)
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
}

func leaseUnderLoad(t *testing.T, e *engine, s *dnsmasq) {
	t.Helper()
	running := map[string]bool{}
	for _, name := range e.killUnderLoad(t, 60, "--network", "lan") {
		a := e.address(t, name, "lan")
		if running[a] {
			t.Errorf("two containers have %s", a)
		}
		running[a] = true
		e.sees(t, e.lan.client, a+":80", name)
	}
	// An address whose container the engine never heard of: people can tell.
	known := map[string]bool{}
	stranded := 0
	for _, a := range e.leasedAddresses(t) {
		known[a] = true
		if running[a] {
			continue
		}
		stranded++
		out, err := e.weft(t, "address", "release", a)
		// The driver takes an endpoint for lost after a minute only.
		if err != nil && !strings.Contains(err.Error(), "is that of an endpoint") {
			t.Errorf("release %s: %s %v", a, out, err)
		}
		delete(known, a)
	}
	for a := range running {
		if !known[a] {
			t.Errorf("%s is a container's, but has no lease", a)
		}
	}
	// What was granted just as the plugin died is known to the server alone, and
	// runs out: nobody extends it.
	var lost []string
	for a := range s.leases(t) {
		if !slices.Contains(e.leasedAddresses(t), a) {
			lost = append(lost, a)
		}
	}
	note("%s: %d leases, %d stranded addresses, %d leases known to the server alone", t.Name(), len(running), stranded, len(lost))
	if len(lost) > 2 {
		t.Errorf("leases that only the server knows of: %v", lost)
	}
	e.must(t, append([]string{"rm", "-f"}, strings.Fields(e.must(t, "ps", "-aq"))...)...)
	e.must(t, "network", "rm", "lan")
	s.has(t, lost...)
}

// leasedAddresses are those of the plugin's leases.
func (e *engine) leasedAddresses(tb testing.TB) []string {
	tb.Helper()
	s, err := e.status(tb)
	if err != nil {
		tb.Fatal(err)
	}
	var list []string
	for _, p := range s.Pools {
		if p.DHCP == nil {
			continue
		}
		for _, l := range p.DHCP.Leases {
			list = append(list, l.Address)
		}
	}
	return list
}
