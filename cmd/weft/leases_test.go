package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/ipam"
)

// These tests last as long as leases do, and run beside each other.

// awaitFor is await for what takes longer.
func (l *lan) awaitFor(limit time.Duration, what string, ok func(ipam.DHCPStatus) bool) (s ipam.DHCPStatus) {
	l.t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if s = l.leases(); ok(s) {
			return s
		}
	}
	l.t.Fatalf("%s: %+v", what, s)
	return s
}

func first(address string) netip.Addr {
	p, _ := netip.ParsePrefix(address)
	return p.Addr()
}

// TestLeaseRenewed has a lease of some seconds extended ten times. dnsmasq grants
// none that is so short.
func TestLeaseRenewed(t *testing.T) {
	t.Parallel()
	for _, kind := range []dhcptest.Kind{dhcptest.ISC, dhcptest.Kea} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			l := newLAN(t)
			l.config.Lease = 3 * time.Second
			server := dhcptest.Start(t, kind, l.router, l.config)
			l.start()
			id, _, _ := l.pool("", `"dhcp":"lan0"`)
			web := l.request(id, "", "web")
			s := l.awaitFor(40*time.Second, "extended ten times", func(s ipam.DHCPStatus) bool { return s.Counts.Extended >= 10 })
			if c := s.Counts; c.Silent+c.Refused+c.Expired > 0 || len(s.Leases) != 1 || s.Leases[0].Address != first(web) || s.Leases[0].Trouble != "" {
				t.Errorf("%s: %+v", web, s)
			}
			until, ok := server.Leases()[first(web)]
			if !ok || time.Until(until) < 0 {
				t.Errorf("the server has %v", server.Leases())
			}
		})
	}
}

// TestServerReconfigured: new options reach status, and another range is a refusal
// that status shows, the log once, and the container not at all.
func TestServerReconfigured(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	l.config.Lease, l.config.Last = 4*time.Second, netip.MustParseAddr("10.77.0.150")
	server := dhcptest.Start(t, dhcptest.Kea, l.router, l.config)
	l.start()
	id, _, _ := l.pool("", `"dhcp":"lan0"`)
	web := l.request(id, "", "web")
	server.Change(func(c *dhcptest.Config) { c.MTU, c.DNS = 1300, []netip.Addr{netip.MustParseAddr("10.77.0.9")} })
	l.awaitFor(20*time.Second, "new options", func(s ipam.DHCPStatus) bool {
		lease := s.Leases[0].Lease
		return lease.MTU == 1300 && len(lease.DNS) == 1 && s.Leases[0].Trouble == ""
	})

	server.Stop()
	l.config.First, l.config.Last = netip.MustParseAddr("10.77.0.200"), netip.MustParseAddr("10.77.0.220")
	dhcptest.Start(t, dhcptest.Kea, l.router, l.config)
	s := l.awaitFor(30*time.Second, "refused", func(s ipam.DHCPStatus) bool {
		return s.Counts.Refused >= 3 && strings.HasPrefix(s.Leases[0].Trouble, "refused: ")
	})
	if len(s.Leases) != 1 || s.Leases[0].Address != first(web) {
		t.Errorf("%s: %+v", web, s)
	}
	if n := strings.Count(l.said(), "was not extended"); n != 1 {
		t.Errorf("said %d times that the lease was not extended", n)
	}
	l.release(id, web)
	if got := first(l.request(id, "", "web")); got.Less(l.config.First) || l.config.Last.Less(got) {
		t.Errorf("recreated: %s", got)
	}
}

// bridged puts the router behind a bridge br0 of the host, as lan0.
func (l *lan) bridged() {
	l.host.Exec("ip", "link", "set", "lan0", "down")
	l.host.Exec("ip", "link", "set", "lan0", "name", "port0")
	l.host.Exec("ip", "link", "set", "port0", "up")
	l.plug("port0")
}

// plug makes the bridge lan0 with these ports.
func (l *lan) plug(ports ...string) {
	l.host.Exec("ip", "link", "add", "lan0", "type", "bridge", "forward_delay", "0")
	for _, p := range ports {
		l.host.Exec("ip", "link", "set", p, "master", "lan0")
	}
	l.host.Exec("ip", "link", "set", "lan0", "up")
}

// leased asks for an address until there is one: a new bridge has no carrier yet.
func (l *lan) leased(id, name string) (a string) {
	l.t.Helper()
	for range 100 {
		if a = l.request(id, "", name); first(a).IsValid() {
			return a
		}
		time.Sleep(50 * time.Millisecond)
	}
	l.t.Fatal(a)
	return ""
}

// TestTwoServers: the one that granted a lease dies, and at T2 the other takes the
// lease over.
func TestTwoServers(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	l.bridged()
	second := netnstest.New(t)
	l.host.Do(func() {
		l.host.Exec("ip", "link", "add", "port1", "type", "veth", "peer", "name", "lan1")
		l.host.Exec("ip", "link", "set", "port1", "up", "master", "lan0")
		second.Take("lan1", "eth0", netip.MustParsePrefix("10.77.0.2/24"))
	})
	l.config.Lease = 22 * time.Second
	servers := map[string]*dhcptest.Server{
		"10.77.0.1": dhcptest.Start(t, dhcptest.ISC, l.router, l.config),
		"10.77.0.2": dhcptest.Start(t, dhcptest.ISC, second, l.config),
	}
	l.start()
	id, _, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0"`)
	web := l.leased(id, "web")
	granted := l.leases().Leases[0].Lease.Server.String()
	servers[granted].Stop()
	s := l.awaitFor(40*time.Second, "taken over", func(s ipam.DHCPStatus) bool { return s.Counts.Extended > 0 })
	if now := s.Leases[0]; now.Address != first(web) || now.Lease.Server.String() == granted || now.Trouble != "" || s.Counts.Silent == 0 || s.Counts.Expired > 0 {
		t.Errorf("%s of %s: %+v", web, granted, s)
	}
}

// TestReplugged: the parent is pulled and plugged in again.
func TestReplugged(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	l.bridged()
	l.config.Lease = 6 * time.Second
	dhcptest.Start(t, dhcptest.ISC, l.router, l.config)
	l.start()
	id, _, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0"`)
	web := l.leased(id, "web")
	l.host.Exec("ip", "link", "delete", "lan0")
	l.awaitFor(20*time.Second, "no link", func(s ipam.DHCPStatus) bool {
		return s.Counts.Silent > 0 && strings.Contains(s.Leases[0].Trouble, "no such link")
	})
	l.plug("port0")
	s := l.awaitFor(20*time.Second, "extended again", func(s ipam.DHCPStatus) bool { return s.Counts.Extended >= 2 && s.Leases[0].Trouble == "" })
	if s.Leases[0].Address != first(web) {
		t.Errorf("%s: %+v", web, s)
	}
}

// TestLeasedDualStack: an address of each family for one MAC.
func TestLeasedDualStack(t *testing.T) {
	t.Parallel()
	l := &lan{t: t, dir: t.TempDir(), host: netnstest.New(t), router: netnstest.New(t)}
	for _, ns := range []*netnstest.NS{l.host, l.router} {
		var err error
		// Link-local addresses are usable at once.
		ns.Do(func() { err = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0) })
		if err != nil {
			t.Fatal(err)
		}
	}
	four := netip.MustParsePrefix("10.77.0.0/24")
	l.host.Do(func() {
		l.host.Exec("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
		l.host.Exec("ip", "link", "set", "lan0", "up")
		l.router.Take("lan1", "eth0", netip.MustParsePrefix("10.77.0.1/24"), netip.MustParsePrefix("fd77::1/64"))
	})
	servers := []*dhcptest.Server{
		dhcptest.Start(t, dhcptest.Dnsmasq, l.router, dhcptest.Config{
			Link: "eth0", Subnet: four, First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.250"), Lease: 2 * time.Minute, Router: netip.MustParseAddr("10.77.0.1"),
		}),
		dhcptest.Start(t, dhcptest.Kea, l.router, dhcptest.Config{
			Link: "eth0", Subnet: netip.MustParsePrefix("fd77::/64"), First: netip.MustParseAddr("fd77::100"), Last: netip.MustParseAddr("fd77::1ff"), Lease: 4 * time.Second,
		}),
	}
	l.start()
	_, refusal, _ := l.pool("", `"dhcp":"lan0","x":"y"`)
	l.contains("an unknown option", refusal, `"x"`)
	id4, _, _ := l.pool("", `"dhcp":"lan0"`)
	learn := func() map[string]any {
		_, m := l.call(t, "IpamDriver.RequestPool", `{"AddressSpace":"weft-local","Pool":"","SubPool":"","V6":true,"Options":{"dhcp":"lan0"}}`)
		return m
	}
	m := learn()
	l.want("subnet, learnt", fmt.Sprint(m["Pool"], m["Data"]), "fd77::/64map[com.docker.network.gateway:::/64]")
	l.must(t, "IpamDriver.ReleasePool", fmt.Sprintf(`{"PoolID":%q}`, m["PoolID"]))
	if granted := servers[1].Leases(); len(granted) > 0 {
		t.Errorf("asking which subnet there is took %v", granted)
	}
	l.host.Exec("ip", "address", "add", "fd77::5/80", "dev", "lan0")
	l.contains("the host's own subnet", fmt.Sprint(learn()["Error"]), "of a subnet that this host is in: give --subnet fd77::/80")
	l.host.Exec("ip", "address", "del", "fd77::5/80", "dev", "lan0")
	id6, pool6, none := l.pool("fd77::/64", `"dhcp":"lan0"`)
	l.want("subnet", pool6, "fd77::/64")
	l.want("gateway, which engines up to 27 else ask for", none, "::/64")
	l.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{"mode":"macvlan","parent":"lan0"}},`+
		`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.77.0.0/24","Gateway":"10.77.0.1/24"}],"IPv6Data":[{"AddressSpace":"weft-local","Pool":"fd77::/64","Gateway":"`+none+`"}]}`)
	a4, a6 := l.request(id4, "", "web"), l.request(id6, "", "web")
	if !strings.HasPrefix(a4, "10.77.0.") || !strings.HasPrefix(a6, "fd77::1") {
		t.Fatalf("%s and %s", a4, a6)
	}
	m = l.must(t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q,"AddressIPv6":%q},"Options":{}}`, netID, epID, a4, a6))
	mac := m["Interface"].(map[string]any)["MacAddress"]
	six := func() (s ipam.DHCPStatus) {
		for _, p := range l.status(t).Pools {
			for _, lease := range p.DHCP.Leases {
				if lease.MAC != mac {
					t.Errorf("the endpoint has %v, leased was %+v", mac, lease)
				}
			}
			if p.Pool == "fd77::/64" {
				s = *p.DHCP
			}
		}
		return s
	}
	for end := time.Now().Add(20 * time.Second); six().Counts.Extended < 2; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not extended: %+v", six())
		}
	}
	if s := six(); s.Counts.Silent+s.Counts.Refused > 0 || s.Leases[0].Address != first(a6) {
		t.Errorf("%+v", s)
	}
	for n, a := range []string{a4, a6} {
		if _, ok := servers[n].Leases()[first(a)]; !ok {
			t.Errorf("%s: the server has %v", a, servers[n].Leases())
		}
	}
	// Starts that fail for their IPv6 address leave no IPv4 lease with the server: the
	// engine gives none back.
	before := len(servers[0].Leases())
	for range 3 {
		l.request(id4, "", "")
		l.contains("an address that DHCPv6 does not have", l.request(id6, "fd77::9", ""), "refused by DHCP server")
	}
	for end := time.Now().Add(5 * time.Second); len(servers[0].Leases()) != before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the server has %v", servers[0].Leases())
		}
	}
	l.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, epID))
	l.release(id6, a6)
	l.again()
	l.want("recreated, after a kill", l.request(id6, "", "web"), a6)
	l.must(t, "NetworkDriver.DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, netID))
}

// TestLeaseByHand: what is reserved for a name, with its MAC, and what `weft
// address` frees.
func TestLeaseByHand(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	server := dhcptest.Start(t, dhcptest.Dnsmasq, l.router, l.config)
	l.start()
	id, _, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0","reserve.db":"10.77.0.150,02:00:00:00:00:50","reserve.far":"10.77.0.20"`)
	weft := func(args string) string {
		t.Helper()
		_, out, errs := weft(t, "", append(strings.Fields(args), "--socket", filepath.Join(l.dir, adminSocket))...)
		return out + errs
	}
	l.want("reserved", l.request(id, "", "db"), "10.77.0.150/24")
	l.contains("reserved, and the server has other plans", l.request(id, "", "far"), "refused by DHCP server")
	l.contains("what is another's", l.request(id, "10.77.0.150", "web"), "is reserved for db")
	if s := l.leases().Leases; len(s) != 1 || s[0].MAC != "02:00:00:00:00:50" || s[0].Name != "db" {
		t.Errorf("%+v", s)
	}
	other := l.request(id, "", "")
	gone := func(a string, want bool) {
		t.Helper()
		for range 50 {
			if _, ok := server.Leases()[first(a)]; ok != want {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("%s: the server has %v, want it gone: %v", a, server.Leases(), want)
	}
	l.contains("release", weft("address release -force "+first(other).String()), "is free")
	gone(other, true)
	l.release(id, "10.77.0.150")
	gone("10.77.0.150/24", false)
	l.again()
	l.want("made again after a kill", l.request(id, "", "db"), "10.77.0.150/24")
	l.contains("reserve", weft("address reserve nas 10.77.0.160 02:00:00:00:00:60"), "is reserved for nas")
	l.want("reserved by command", l.request(id, "", "nas"), "10.77.0.160/24")
	if s := l.leases().Leases; len(s) != 2 || s[1].MAC != "02:00:00:00:00:60" {
		t.Errorf("%+v", s)
	}
}

// TestKilledWhileLeasing ends the plugin at any moment of requests and releases, a
// number of times. What the server has leased in the end is what status knows of.
func TestKilledWhileLeasing(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	server := dhcptest.Start(t, dhcptest.Dnsmasq, l.router, l.config)
	l.start()
	id, _, _ := l.pool("", `"dhcp":"lan0"`)
	var mu sync.Mutex
	live := map[string]bool{}
	// call is false where the process died on the way.
	call := func(client *http.Client, method, body string, into *string) bool {
		resp, err := client.Post("http://weft/IpamDriver."+method, "", strings.NewReader(body))
		if err != nil {
			return false
		}
		defer func() { _ = resp.Body.Close() }()
		m, err := decoded(resp.Body)
		if into != nil && err == nil {
			*into, _ = m["Address"].(string)
		}
		return err == nil && resp.StatusCode == http.StatusOK
	}
	for round := range 12 {
		client, stop := l.client, make(chan struct{})
		var wg sync.WaitGroup
		for worker := range 3 {
			wg.Go(func() {
				name := []string{"null", `{"com.docker.network.endpoint.name":"web"}`, fmt.Sprintf(`{"com.docker.network.endpoint.name":"n%d"}`, round%4)}[worker]
				for {
					select {
					case <-stop:
						return
					default:
					}
					var a string
					if !call(client, "RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":"","Options":%s}`, id, name), &a) {
						return
					}
					mu.Lock()
					if live[a] {
						t.Errorf("%s was granted twice", a)
					}
					live[a] = true
					release := len(live) > 20 || rand.IntN(3) > 0
					if release {
						delete(live, a) // the engine never asks again
					}
					mu.Unlock()
					if release && !call(client, "ReleaseAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q}`, id, first(a)), nil) {
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		l.again()
		close(stop)
		wg.Wait()
	}
	l.again()
	known := map[netip.Addr]bool{}
	var has []netip.Addr
	for range 100 { // what the last kill left is given back
		known = map[netip.Addr]bool{}
		for _, p := range l.status(t).Pools {
			for _, lease := range p.DHCP.Leases {
				known[lease.Address] = true
			}
			for _, n := range p.Names {
				known[n.Address] = true
			}
		}
		has = slices.SortedFunc(maps.Keys(server.Leases()), netip.Addr.Compare)
		if slices.Equal(has, slices.SortedFunc(maps.Keys(known), netip.Addr.Compare)) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if want := slices.SortedFunc(maps.Keys(known), netip.Addr.Compare); !slices.Equal(has, want) {
		t.Errorf("the server has leased %v, known are %v", has, want)
	}
	for a := range live {
		if !known[first(a)] {
			t.Errorf("%s is lost", a)
		}
		l.release(id, a)
	}
}
