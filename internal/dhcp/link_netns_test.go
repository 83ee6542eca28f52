package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// A link that leads nowhere is said at once, in one line.
func TestUnusableLinks(t *testing.T) {
	host, router := newLAN(t)
	host.Exec("ip", "link", "add", "down0", "type", "veth", "peer", "name", "down1")
	host.Exec("ip", "addr", "flush", "dev", "lan0", "scope", "link")
	router.Exec("ip", "link", "set", "eth0", "down")
	type call struct {
		link   string
		within netip.Prefix
		want   string
	}
	check := func(tc call) {
		t.Helper()
		start := time.Now()
		_, err := hasty().Acquire(t.Context(), tc.link, station(1), netip.Addr{}, tc.within)
		if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want %q", tc.link, err, tc.want)
		}
		if d := time.Since(start); d > 1500*time.Millisecond {
			t.Errorf("%s: after %s", tc.link, d)
		}
	}
	for _, tc := range []call{
		{"none0", lan4, "DHCP on none0: there is no such link: check the name"},
		{"a-name-that-is-too-long", lan4, "is not the name of a link"},
		{"lo", lan4, "the link is not an Ethernet one"},
		{"down0", lan4, "DHCP on down0: the link is down: set it up"},
		{"lan0", lan4, "the link has no carrier"},
	} {
		check(tc)
	}
	router.Exec("ip", "link", "set", "eth0", "up")
	host.Exec("ip", "addr", "flush", "dev", "lan0", "scope", "link")
	check(call{"lan0", lan6, "the link has no IPv6 link-local address"})
}

// A card that comes up beside us, as at boot, has the time that a server has.
func TestLateCarrier(t *testing.T) {
	host, router := newLAN(t)
	n := &lan{t, dhcptest.Dnsmasq, dhcptest.Start(t, dhcptest.Dnsmasq, router, config4), lan4}
	router.Exec("ip", "link", "set", "eth0", "down")
	host.Exec("ip", "link", "set", "lan0", "down")
	start := time.Now()
	if _, err := new(Client).Offer(t.Context(), "lan0", station(1), false); err == nil || time.Since(start) > time.Second {
		t.Errorf("what there is on a link that is down, after %s: %v", time.Since(start), err)
	}
	done := make(chan Lease, 1)
	go host.Do(func() {
		l, err := new(Client).Acquire(t.Context(), "lan0", station(1), netip.Addr{}, lan4)
		if err != nil {
			t.Error(err)
		}
		done <- l
	})
	time.Sleep(200 * time.Millisecond)
	host.Exec("ip", "link", "set", "lan0", "up")
	time.Sleep(time.Second)
	router.Exec("ip", "link", "set", "eth0", "up")
	if l := <-done; l.Address.IsValid() {
		n.extend(station(1), l)
	}
	ctx, cancel := context.WithCancel(t.Context())
	router.Exec("ip", "link", "set", "eth0", "down")
	time.AfterFunc(100*time.Millisecond, cancel)
	start = time.Now()
	if _, err := new(Client).Acquire(ctx, "lan0", station(1), netip.Addr{}, lan4); err == nil || time.Since(start) > 3*time.Second {
		t.Errorf("nobody waits any more, after %s: %v", time.Since(start), err)
	}
}

// A carrier that was away for a moment is noticed later.
func TestCarrier(t *testing.T) {
	host, router := newLAN(t)
	look := func() (changes uint32, up bool) {
		host.Do(func() { changes, up = new(Client).Carrier("lan0") })
		return changes, up
	}
	first, up := look()
	if !up {
		t.Fatal("lan0 is not up")
	}
	router.Exec("ip", "link", "set", "eth0", "down")
	if _, up := look(); up {
		t.Error("lan0 is up without a carrier")
	}
	router.Exec("ip", "link", "set", "eth0", "up")
	if n, up := look(); !up || n != first+2 {
		t.Errorf("%d changes of the carrier, up %t; before %d", n, up, first)
	}
	host.Do(func() {
		if n, up := new(Client).Carrier("none0"); n != 0 || up {
			t.Errorf("a link that is not there: %d, %t", n, up)
		}
	})
}

func TestUnusableStations(t *testing.T) {
	for want, change := range map[string]func(*Station){
		"hardware address": func(s *Station) { s.MAC = [6]byte{} },
		"of a station":     func(s *Station) { s.MAC[0] = 1 },
		"this one 0":       func(s *Station) { s.DUID = nil },
		"this one 131":     func(s *Station) { s.DUID = make([]byte, 131) },
	} {
		s := station(1)
		change(&s)
		if _, err := new(Client).Offer(t.Context(), "lan0", s, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v; want %q", s, err, want)
		}
	}
}

func TestUnusableLeases(t *testing.T) {
	var c Client
	for _, tc := range []struct{ want, within string }{{"10.66.0.5", "10.77.0.0/24"}, {"10.77.0.5", "fd77::/64"}, {"fd77::5", "10.77.0.0/24"}} {
		_, err := c.Acquire(t.Context(), "lan0", station(1), addr(tc.want), prefix(tc.within))
		if err == nil || !strings.HasSuffix(err.Error(), tc.want+" is wanted, which is outside "+tc.within) {
			t.Errorf("%s within %s: %v", tc.want, tc.within, err)
		}
	}
	for _, l := range []Lease{{}, {Address: prefix("10.77.0.5/24")}, {Server: addr("10.77.0.1")}, {Address: prefix("fd77::5/64"), Server: addr("10.77.0.1")}} {
		_, err := c.Extend(t.Context(), "lan0", station(1), l)
		for _, err := range []error{err, c.Release(t.Context(), "lan0", station(1), l), c.Decline(t.Context(), "lan0", station(1), l)} {
			if err == nil || !strings.Contains(err.Error(), "not a lease") {
				t.Errorf("%v: %v", l, err)
			}
		}
	}
}

func TestNoServer(t *testing.T) {
	newLAN(t)
	for name, within := range map[string]netip.Prefix{"IPv4": lan4, "IPv6": lan6} {
		start := time.Now()
		_, err := hasty().Acquire(t.Context(), "lan0", station(1), netip.Addr{}, within)
		if !errors.Is(err, ErrSilent) || !strings.HasPrefix(err.Error(), "no DHCP server answered on lan0 within 0.7") {
			t.Errorf("%s: %v", name, err)
		}
		if d := time.Since(start); d > 1500*time.Millisecond {
			t.Errorf("%s: after %s", name, d)
		}
	}
	var all time.Duration
	for _, w := range waits {
		all += w
	}
	if all > 8*time.Second || len(waits) != 3 {
		t.Errorf("%d questions within %s", len(waits), all)
	}
}

// The second question finds a server that started late.
func TestLateServer(t *testing.T) {
	host, router := newLAN(t)
	n := &lan{t, dhcptest.Dnsmasq, dhcptest.Start(t, dhcptest.Dnsmasq, router, config4), lan4}
	n.server.Stop()
	done := make(chan error)
	go func() {
		defer close(done)
		host.Do(func() {
			_, err := new(Client).Acquire(t.Context(), "lan0", station(1), netip.Addr{}, lan4)
			done <- err
		})
	}()
	time.Sleep(200 * time.Millisecond)
	n.server.Resume()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A parent that is pulled and plugged in again is another link of that name.
func TestPluggedInAgain(t *testing.T) {
	host, router := newLAN(t)
	n := &lan{t, dhcptest.Dnsmasq, dhcptest.Start(t, dhcptest.Dnsmasq, router, config4), lan4}
	l := n.acquire(station(1), netip.Addr{})
	host.Exec("ip", "link", "del", "lan0")
	if _, err := new(Client).Extend(t.Context(), "lan0", station(1), l); err == nil {
		t.Error("extended over no link")
	}
	n.server.Stop()
	host.Exec("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	host.Exec("ip", "link", "set", "lan0", "up")
	router.Take("lan1", "eth0", prefix("10.77.0.1/24"))
	awaitCarrier(t, "lan0")
	n.server.Resume()
	n.extend(station(1), l)
}

// Two servers with an address range each, on a bridge, who both hold themselves
// for the only one. The first to answer is the one that grants, and the other's
// refusal to extend means nothing.
func TestTwoServers(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			host, router := newLAN(t)
			host.Exec("ip", "link", "add", "br0", "type", "bridge")
			host.Exec("ip", "link", "set", "br0", "up")
			host.Exec("ip", "link", "set", "lan0", "master", "br0")
			second := newRouter(t)
			host.Exec("ip", "link", "add", "lan2", "type", "veth", "peer", "name", "lan3")
			host.Exec("ip", "link", "set", "lan2", "master", "br0", "up")
			second.Take("lan3", "eth0", prefix("10.77.0.2/24"), prefix("fd77::2/64"))
			awaitCarrier(t, "br0")

			other := cfg
			cfg.Authoritative, other.Authoritative = true, true
			cfg.Last = cfg.First
			other.First = cfg.First.Next()
			servers := []*dhcptest.Server{
				dhcptest.Start(t, dhcptest.Dnsmasq, router, cfg),
				dhcptest.Start(t, dhcptest.ISC, second, other),
			}
			l, err := new(Client).Acquire(t.Context(), "br0", station(1), netip.Addr{}, cfg.Subnet)
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				next, err := new(Client).Extend(t.Context(), "br0", station(1), l)
				if err != nil {
					t.Fatal(err)
				}
				if next.Server != l.Server || string(next.ServerDUID) != string(l.ServerDUID) {
					t.Errorf("granted by %s, extended by %s", l.server(), next.server())
				}
				l = next
			}
			var holders int
			for _, s := range servers {
				for a := range s.Leases() {
					if holders++; a != l.Address.Addr() {
						t.Errorf("a server holds %s, the station has %s", a, l.Address)
					}
				}
			}
			if holders != 1 {
				t.Errorf("%d servers hold a lease", holders)
			}
		})
	}
}
