package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/internal/dhcp/dhcptest"
	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/ipam"
)

// lan is a host with a card lan0, the router at the other end of its cable, and
// a plugin on the host, which is asked by its real socket.
type lan struct {
	*process
	t            testing.TB
	dir          string
	host, router *netnstest.NS
	config       dhcptest.Config
}

func newLAN(tb testing.TB) *lan {
	tb.Helper()
	l := &lan{t: tb, dir: tb.TempDir(), host: netnstest.New(tb), router: netnstest.New(tb)}
	l.host.Do(func() {
		l.host.Exec("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
		l.host.Exec("ip", "link", "set", "lan0", "up")
		l.router.Take("lan1", "eth0", netip.MustParsePrefix("10.77.0.1/24"))
	})
	// The kernel tells of a carrier a moment after both ends are up.
	up := false
	for end := time.Now().Add(5 * time.Second); !up && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		l.host.Do(func() { _, up = new(dhcp.Client).Carrier("lan0") })
	}
	if !up {
		tb.Fatal("lan0 has no carrier")
	}
	l.config = dhcptest.Config{
		Link: "eth0", Subnet: netip.MustParsePrefix("10.77.0.0/24"), First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.250"),
		Lease: 2 * time.Minute, Router: netip.MustParseAddr("10.77.0.1"), MTU: 1400, Authoritative: true,
	}
	return l
}

func (l *lan) start() {
	l.t.Helper()
	cmd := exec.Command(os.Args[0], "serve", "--socket", l.dir+"/p.sock", "--state", l.dir)
	cmd.Env = append(os.Environ(), asMain+"=1")
	l.host.Do(func() { l.process = startCmd(l.t, l.dir, cmd) })
}

// again kills the plugin and starts it.
func (l *lan) again() {
	l.t.Helper()
	if err := l.Process.Kill(); err != nil {
		l.t.Fatal(err)
	}
	<-l.ended
	l.start()
}

func (l *lan) pool(subnet, options string) (id, pool, gateway string) {
	l.t.Helper()
	status, m := l.call(l.t, "IpamDriver.RequestPool", fmt.Sprintf(`{"AddressSpace":"weft-local","Pool":%q,"SubPool":"","V6":%v,"Options":{%s}}`,
		subnet, strings.Contains(subnet, ":"), options))
	if status != 200 {
		return "", fmt.Sprint(m["Error"]), ""
	}
	data := m["Data"].(map[string]any)
	if g := data["com.docker.network.gateway"]; g != nil {
		gateway = g.(string)
	}
	return fmt.Sprint(m["PoolID"]), fmt.Sprint(m["Pool"]), gateway
}

func (l *lan) request(pool, address, name string) string {
	l.t.Helper()
	options := "null"
	if name != "" {
		options = fmt.Sprintf(`{"com.docker.network.endpoint.name":%q}`, name)
	}
	status, m := l.call(l.t, "IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q,"Options":%s}`, pool, address, options))
	if status != 200 {
		return fmt.Sprint(m["Error"])
	}
	return fmt.Sprint(m["Address"])
}

func (l *lan) release(pool, address string) {
	l.t.Helper()
	a, _, _ := strings.Cut(address, "/")
	l.must(l.t, "IpamDriver.ReleaseAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q}`, pool, a))
}

func (l *lan) want(what, got, want string) {
	l.t.Helper()
	if got != want {
		l.t.Errorf("%s: %s, want %s", what, got, want)
	}
}

func (l *lan) contains(what, got, part string) {
	l.t.Helper()
	if !strings.Contains(got, part) {
		l.t.Errorf("%s: %s, want something with %q", what, got, part)
	}
}

// leases is what status says of the only pool with DHCP.
func (l *lan) leases() ipam.DHCPStatus {
	l.t.Helper()
	for range 100 { // it may be starting
		for _, p := range l.status(l.t).Pools {
			if p.DHCP != nil {
				return *p.DHCP
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	l.t.Fatal("no pool with DHCP")
	return ipam.DHCPStatus{}
}

// TestDHCP takes addresses from a real server through the calls of an engine.
func TestDHCP(t *testing.T) {
	l := newLAN(t)
	server := dhcptest.Start(t, dhcptest.Dnsmasq, l.router, l.config)
	l.start()
	id, pool, gateway := l.pool("", `"dhcp":"lan0"`)
	l.want("subnet", pool, "10.77.0.0/24")
	l.want("gateway", gateway, "10.77.0.1/24")
	if len(server.Leases()) != 0 {
		t.Errorf("asking which subnet there is took %v", server.Leases())
	}
	_, refusal, _ := l.pool("10.78.0.0/24", `"dhcp":"lan0"`)
	l.contains("another subnet", refusal, "hands out addresses of 10.77.0.0/24, not of 10.78.0.0/24: give --subnet 10.77.0.0/24")

	web := l.request(id, "", "web")
	if a, err := netip.ParsePrefix(web); err != nil || a.Bits() != 24 || a.Addr().Less(l.config.First) || l.config.Last.Less(a.Addr()) {
		t.Fatalf("leased %s", web)
	}
	l.want("asked for", l.request(id, "10.77.0.200", "db"), "10.77.0.200/24")
	l.contains("asked for out of range", l.request(id, "10.77.0.20", "mail"), "10.77.0.20")
	first := l.request(id, "", "")
	second := l.request(id, "", "")
	if s := server.Leases(); len(s) != 4 {
		t.Errorf("the server knows of %v", s)
	}
	status := l.leases()
	if len(status.Leases) != 4 || status.Counts.Granted != 4 || status.Leases[3].Name == "" && status.Leases[0].Lease.MTU != 1400 {
		t.Errorf("status: %+v", status)
	}

	// The name's lease is not given back, the others are.
	l.release(id, web)
	l.release(id, first)
	if s := server.Leases(); len(s) != 3 {
		t.Errorf("the server knows of %v", s)
	}
	l.again()
	l.want("recreated, after a kill", l.request(id, "", "web"), web)
	l.want("a station without a name, again", l.request(id, "", ""), first)
	if len(l.leases().Leases) != 4 {
		t.Errorf("status: %+v", l.leases())
	}
	for _, a := range []string{web, "10.77.0.200/24", first, second} {
		l.release(id, a)
	}
	l.again()
	l.want("after a kill without any lease", l.request(id, "", "web"), web)
	l.release(id, web)
	l.must(t, "IpamDriver.ReleasePool", fmt.Sprintf(`{"PoolID":%q}`, id))
	if d := l.status(t); len(d.Pools) != 0 {
		t.Errorf("left: %+v", d.Pools)
	}
}

// atOnce asks for n addresses at the same time and returns them, and how long
// that took.
func (l *lan) atOnce(pool string, n int) (all []string, took time.Duration) {
	l.t.Helper()
	all = make([]string, n)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range n {
		wg.Go(func() { all[i] = l.request(pool, "", "") })
	}
	wg.Wait()
	return all, time.Since(begin)
}

// TestDHCPAtOnce is a host that boots with a hundred containers.
func TestDHCPAtOnce(t *testing.T) {
	l := newLAN(t)
	server := dhcptest.Start(t, dhcptest.Dnsmasq, l.router, l.config)
	l.start()
	id, _, _ := l.pool("", `"dhcp":"lan0"`)
	all, took := l.atOnce(id, 100)
	t.Logf("100 leases at once: %v", took)
	granted, seen := server.Leases(), map[netip.Addr]bool{}
	for _, text := range all {
		a, err := netip.ParsePrefix(text)
		if err != nil {
			t.Errorf("one of them: %s", text)
			continue
		}
		if _, ok := granted[a.Addr()]; !ok || seen[a.Addr()] {
			t.Errorf("%s: granted %v, and given to another %v", a, ok, seen[a.Addr()])
		}
		seen[a.Addr()] = true
	}
	if s := l.leases(); len(granted) != 100 || len(s.Leases) != 100 || s.Counts.Granted != 100 {
		t.Errorf("the server has granted %d, status has %d of %d", len(granted), len(s.Leases), s.Counts.Granted)
	}
	// All of them go with the pool, and the server hears of it.
	l.must(t, "IpamDriver.ReleasePool", fmt.Sprintf(`{"PoolID":%q}`, id))
	for range 100 {
		if len(server.Leases()) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("the server still knows of %d", len(server.Leases()))
}

// BenchmarkDHCPAtOnce is how long those hundred wait for the last of them.
func BenchmarkDHCPAtOnce(b *testing.B) {
	l := newLAN(b)
	dhcptest.Start(b, dhcptest.Dnsmasq, l.router, l.config)
	l.start()
	var all time.Duration
	for b.Loop() {
		id, _, _ := l.pool("", `"dhcp":"lan0"`)
		addresses, took := l.atOnce(id, 100)
		for _, a := range addresses {
			if _, err := netip.ParsePrefix(a); err != nil {
				b.Fatal(a)
			}
		}
		if took >= 5*time.Second {
			b.Errorf("100 leases at once took %v", took)
		}
		all += took
		l.must(b, "IpamDriver.ReleasePool", fmt.Sprintf(`{"PoolID":%q}`, id))
	}
	b.ReportMetric(all.Seconds()/float64(b.N), "s/100")
}

// TestDHCPOnTheHostsLAN: the engine would ask for ever if it was answered a
// subnet that the host is on.
func TestDHCPOnTheHostsLAN(t *testing.T) {
	l := newLAN(t)
	dhcptest.Start(t, dhcptest.Dnsmasq, l.router, l.config)
	l.host.Exec("ip", "address", "add", "10.77.0.5/24", "dev", "lan0")
	l.start()
	id, pool, gateway := l.pool("", `"dhcp":"lan0"`)
	l.want("subnet", pool, "0.0.0.0/0")
	l.want("gateway", gateway, "10.77.0.1/24")
	l.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{"mode":"macvlan","parent":"lan0"}},`+
		`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"0.0.0.0/0","Gateway":"10.77.0.1/24"}],"IPv6Data":[]}`)
	web := l.request(id, "", "web")
	end := strings.Repeat("e", 64)
	m := l.must(t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q},"Options":{}}`, netID, end, web))
	mac := m["Interface"].(map[string]any)["MacAddress"]
	if s := l.leases().Leases; len(s) != 1 || s[0].MAC != mac {
		t.Errorf("the endpoint has %v, leased were %+v", mac, s)
	}
	given, pool, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0"`)
	l.want("a second network on the LAN, with its subnet", pool, "10.77.0.0/24")
	if other := l.request(given, "", "web"); other == web || !strings.HasPrefix(other, "10.77.0.") {
		t.Errorf("the same name there: %s, here %s", other, web)
	}
	l.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, end))
	l.must(t, "NetworkDriver.DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, netID))
}

// TestDHCPSilent: no server, one that comes later, one that goes, and one that
// has forgotten everything.
func TestDHCPSilent(t *testing.T) {
	l := newLAN(t)
	l.start()
	_, refusal, _ := l.pool("", `"dhcp":"lan0"`)
	l.contains("no server", refusal, "no DHCP server answered on lan0")
	_, refusal, _ = l.pool("", `"dhcp":"lan7"`)
	l.contains("no link", refusal, "lan7")
	id, pool, gateway := l.pool("10.77.0.0/24", `"dhcp":"lan0"`)
	l.want("no server, but a subnet", pool+gateway, "10.77.0.0/24")
	l.contains("no server", l.request(id, "", "web"), "no DHCP server answered on lan0")
	l.contains("no router", l.call2("IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":"","Options":{"RequestAddressType":"com.docker.network.gateway"}}`, id)), "give its address with --gateway")

	l.config.Lease = 6 * time.Second
	server := dhcptest.Start(t, dhcptest.ISC, l.router, l.config)
	web := l.request(id, "", "web")
	l.contains("the server has come", web, "/24")
	l.await("extended", func(s ipam.DHCPStatus) bool { return s.Counts.Extended >= 2 })
	server.Stop()
	l.await("nobody there", func(s ipam.DHCPStatus) bool { return s.Counts.Silent > 0 && s.Leases[0].Trouble != "" })
	l.again()
	l.await("the lease ends", func(s ipam.DHCPStatus) bool { return s.Counts.Expired == 1 && len(s.Leases) == 1 })
	server.Resume()
	l.await("the server is back", func(s ipam.DHCPStatus) bool { return s.Leases[0].Trouble == "" })
	l.want("recreated", func() string { l.release(id, web); return l.request(id, "", "web") }(), web)
}

// call2 returns the error of a call.
func (l *lan) call2(method, body string) string {
	l.t.Helper()
	_, m := l.call(l.t, method, body)
	return fmt.Sprint(m["Error"])
}

// await waits until status says so.
func (l *lan) await(what string, ok func(ipam.DHCPStatus) bool) {
	l.t.Helper()
	var s ipam.DHCPStatus
	for range 600 {
		if s = l.leases(); ok(s) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	l.t.Fatalf("%s: %+v", what, s)
}
