package dhcp

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
	"github.com/weftnet/weft/internal/netnstest"
)

// byValue compares the types of netip, which go-cmp does not look into.
var byValue = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// lan is a server, and stations on lan0 that ask it.
type lan struct {
	*testing.T
	kind   dhcptest.Kind
	server *dhcptest.Server
	within netip.Prefix
}

// onEach runs f with each server of the configuration's family, or with some, at
// the same time and in namespaces of their own.
func onEach(t *testing.T, cfg dhcptest.Config, f func(*lan), some ...dhcptest.Kind) {
	t.Helper()
	t.Parallel()
	if some == nil {
		some = []dhcptest.Kind{dhcptest.Dnsmasq, dhcptest.ISC, dhcptest.Kea}
	}
	for _, kind := range some {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			_, router := newLAN(t)
			f(&lan{t, kind, dhcptest.Start(t, kind, router, cfg), cfg.Subnet})
		})
	}
}

// acquire has a client of its own each time: one remembers nothing.
func (n *lan) acquire(s Station, want netip.Addr) Lease {
	n.Helper()
	l, err := new(Client).Acquire(n.Context(), "lan0", s, want, n.within)
	if err != nil {
		n.Fatal(err)
	}
	n.wantLeased(l)
	return l
}

func (n *lan) extend(s Station, l Lease) Lease {
	n.Helper()
	l2, err := new(Client).Extend(n.Context(), "lan0", s, l)
	if err != nil {
		n.Fatal(err)
	}
	if l2.Address != l.Address || !l2.Granted.After(l.Granted) {
		n.Errorf("extended %s of %s as %s of %s", l.Address, l.Granted, l2.Address, l2.Granted)
	}
	return l2
}

// wantLeased expects the server to hold the lease, up to the same second or so.
func (n *lan) wantLeased(l Lease) {
	n.Helper()
	ends := l.Granted.Add(l.Valid)
	n.eventually(func() bool {
		end := n.server.Leases()[l.Address.Addr()]
		return end.Sub(ends).Abs() < 2*time.Second
	}, "the server does not hold %s until %s", l.Address, ends)
}

func (n *lan) wantFree(a netip.Addr) {
	n.Helper()
	n.eventually(func() bool { _, held := n.server.Leases()[a]; return !held }, "the server still holds %s", a)
}

func (n *lan) eventually(ok func() bool, format string, arg ...any) {
	n.Helper()
	for range 200 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	n.Errorf(format+"; it holds %v", append(arg, n.server.Leases())...)
}

// afterRestart is a lease as a record has it.
func afterRestart(t *testing.T, l Lease) (out Lease) {
	t.Helper()
	b, err := json.Marshal(l)
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(l, out, byValue); diff != "" {
		t.Errorf("from disk (-want +got):\n%s", diff)
	}
	return out
}

func TestAcquireDecodesEveryOption(t *testing.T) {
	onEach(t, config4, func(n *lan) {
		offer, err := new(Client).Offer(n.Context(), "lan0", station(1), false)
		if err != nil {
			n.Fatal(err)
		}
		if held := n.server.Leases(); len(held) > 0 {
			n.Errorf("an offer took %v", held)
		}
		l := n.acquire(station(1), netip.Addr{})
		want := Lease{
			Address: netip.PrefixFrom(l.Address.Addr(), lan4.Bits()),
			Server:  addr("10.77.0.1"),
			Router:  addr("10.77.0.1"),
			MTU:     config4.MTU,
			Routes:  []Route{{To: prefix("10.80.0.0/12"), Via: addr("10.77.0.2")}},
			DNS:     config4.DNS,
			Domain:  config4.Domain,
			Granted: l.Granted,
			Renew:   config4.Lease / 2,
			Rebind:  config4.Lease / 8 * 7,
			Valid:   config4.Lease,
		}
		if diff := cmp.Diff(want, l, byValue); diff != "" {
			n.Errorf("lease (-want +got):\n%s", diff)
		}
		want.Address, want.Granted = offer.Address, offer.Granted // the next address may be offered each time
		if diff := cmp.Diff(want, offer, byValue); diff != "" || !lan4.Contains(offer.Address.Addr()) {
			n.Errorf("offer (-want +got):\n%s", diff)
		}
	})
}

// A server without classless routes says the router in its own option.
func TestRouterOption(t *testing.T) {
	cfg := config4
	cfg.Routes = nil
	onEach(t, cfg, func(n *lan) {
		if l := n.acquire(station(1), netip.Addr{}); l.Router != cfg.Router || l.Routes != nil {
			n.Errorf("router %s, routes %v; want %s alone", l.Router, l.Routes, cfg.Router)
		}
	})
}

func TestSameStationSameAddress(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				l := n.acquire(station(1), netip.Addr{})
				other := n.acquire(station(2), netip.Addr{})
				if other.Address == l.Address {
					n.Errorf("two stations have %s", l.Address)
				}
				moved := station(1) // with the same identity (RFC 4361), as after the container was made anew
				moved.MAC[5] = 99
				for _, s := range []Station{station(1), moved} {
					if again := n.acquire(s, netip.Addr{}); again.Address != l.Address {
						n.Errorf("the same station has %s, and then %s", l.Address, again.Address)
					}
				}
			})
		})
	}
}

func TestWantedAddress(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				want := cfg.First.Next().Next().Next()
				if l := n.acquire(station(1), want); l.Address.Addr() != want {
					n.Errorf("asked for %s, got %s", want, l.Address)
				}
				start := time.Now()
				_, err := new(Client).Acquire(n.Context(), "lan0", station(2), want, n.within)
				if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), want.String()+" on lan0 is refused") ||
					!strings.Contains(err.Error(), " instead") {
					n.Errorf("somebody else's address: %v", err)
				}
				if d := time.Since(start); d > 2*time.Second {
					n.Errorf("the refusal took %s", d)
				}
			})
		})
	}
}

// dnsmasq grants two minutes at least, the others four seconds, which are long
// over at the end. All of them at the same time: it is mostly waiting.
func TestExtendTenTimes(t *testing.T) {
	t.Parallel()
	type held struct {
		*lan
		host  *netnstest.NS
		name  string
		lease Lease
		first time.Time // when it would have ended
	}
	var all []*held
	for name, cfg := range families {
		cfg.Lease = 4 * time.Second
		for _, kind := range []dhcptest.Kind{dhcptest.Dnsmasq, dhcptest.ISC, dhcptest.Kea} {
			host, router := newLAN(t)
			n := &lan{t, kind, dhcptest.Start(t, kind, router, cfg), cfg.Subnet}
			all = append(all, &held{lan: n, host: host, name: string(kind) + " " + name})
		}
	}
	for round := range 11 {
		for _, h := range all {
			h.host.Do(func() {
				if round == 0 {
					h.lease = h.acquire(station(1), netip.Addr{})
					h.first = h.server.Leases()[h.lease.Address.Addr()]
					return
				}
				h.lease = h.extend(station(1), afterRestart(t, h.lease))
				h.wantLeased(h.lease)
			})
		}
		time.Sleep(time.Second)
	}
	for _, h := range all {
		last := h.server.Leases()[h.lease.Address.Addr()]
		t.Logf("%s: the end moved by %s", h.name, last.Sub(h.first))
		if last.Sub(h.first) < 9*time.Second {
			t.Errorf("%s: ten times extended, and the end moved from %s to %s", h.name, h.first, last)
		}
	}
}

func TestExtendPastT2(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				l := n.acquire(station(1), netip.Addr{})
				l.Granted = l.Granted.Add(-l.Rebind)
				if l.ServerDUID != nil { // another one, which is gone
					l.ServerDUID = []byte{0, 5, 1}
				} else {
					l.Server = addr("10.77.0.250")
				}
				n.wantLeased(n.extend(station(1), l))
			})
		})
	}
}

// A server that comes back has its leases from disk.
func TestExtendAfterServerRestart(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				l := n.acquire(station(1), netip.Addr{})
				n.server.Stop()
				if _, err := hasty().Extend(n.Context(), "lan0", station(1), l); !errors.Is(err, ErrSilent) {
					n.Errorf("extend without a server: %v; want that no one answered", err)
				}
				n.server.Resume()
				n.wantLeased(n.extend(station(1), l))
			})
		})
	}
}

func TestReleaseFreesTheAddress(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				l := n.acquire(station(1), netip.Addr{})
				if err := new(Client).Release(n.Context(), "lan0", station(1), l); err != nil {
					n.Fatal(err)
				}
				n.wantFree(l.Address.Addr())
				if again := n.acquire(station(2), l.Address.Addr()); again.Address != l.Address {
					n.Errorf("after its release %s is not to be had: %s", l.Address, again.Address)
				}
			})
		})
	}
}

func TestDeclinedAddressIsNotOfferedAgain(t *testing.T) {
	for name, cfg := range families {
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				l := n.acquire(station(1), netip.Addr{})
				if err := new(Client).Decline(n.Context(), "lan0", station(1), l); err != nil {
					n.Fatal(err)
				}
				n.wantFree(l.Address.Addr())
				if again := n.acquire(station(1), netip.Addr{}); again.Address == l.Address {
					n.Errorf("%s was declined and granted again", l.Address)
				}
			})
		})
	}
}

// What servers do with a lease that they have never heard of: say nothing,
// refuse it, or grant it if nobody else has it. What they must not do is grant
// an address of another subnet.
func TestExtendUnknownLease(t *testing.T) {
	here := Lease{
		Address: netip.PrefixFrom(addr("10.77.0.222"), 24), Server: addr("10.77.0.1"), Granted: time.Now(),
		Renew: time.Minute, Rebind: time.Minute, Valid: time.Minute,
	}
	elsewhere := here
	elsewhere.Address = prefix("10.66.0.5/24")
	for _, tc := range []struct {
		name  string
		lease Lease
		only  bool // the LAN's only server, by its configuration
		want  map[dhcptest.Kind]error
	}{
		{"unknown", here, false, map[dhcptest.Kind]error{dhcptest.Dnsmasq: ErrSilent, dhcptest.ISC: nil, dhcptest.Kea: ErrSilent}},
		{"unknown to the only server", here, true, map[dhcptest.Kind]error{dhcptest.Dnsmasq: nil, dhcptest.ISC: nil, dhcptest.Kea: ErrRefused}},
		{"elsewhere", elsewhere, false, map[dhcptest.Kind]error{dhcptest.Dnsmasq: ErrSilent, dhcptest.ISC: ErrSilent, dhcptest.Kea: ErrSilent}},
		{"elsewhere to the only server", elsewhere, true, map[dhcptest.Kind]error{dhcptest.Dnsmasq: ErrRefused, dhcptest.ISC: ErrRefused, dhcptest.Kea: ErrRefused}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := config4
			cfg.Authoritative = tc.only
			onEach(t, cfg, func(n *lan) {
				_, err := hasty().Extend(n.Context(), "lan0", station(1), tc.lease)
				if !errors.Is(err, tc.want[n.kind]) {
					n.Errorf("extend: %v; want %v", err, tc.want[n.kind])
				}
			})
		})
	}
}

// The host name reaches the server, and a reservation by name, by client ID or
// by MAC is what the station gets.
func TestReservations(t *testing.T) {
	t.Parallel()
	one := station(1)
	one.Name = "Web_1"
	by := map[string]dhcptest.Reservation{
		"MAC":       {MAC: "02:77:00:00:00:01"},
		"client ID": {ClientID: (&v4{station: one}).clientID()},
		"name":      {Name: "web-1"},
	}
	for name, r := range by {
		r.Address = addr("10.77.0.55")
		cfg := config4
		cfg.Reservations = []dhcptest.Reservation{r}
		var some []dhcptest.Kind
		if r.Name != "" {
			some = []dhcptest.Kind{dhcptest.Dnsmasq}
		}
		t.Run(name, func(t *testing.T) {
			onEach(t, cfg, func(n *lan) {
				l, err := new(Client).Acquire(n.Context(), "lan0", one, netip.Addr{}, lan4) // dhcpd does not list it as leased
				if err != nil || l.Address.Addr() != r.Address {
					n.Errorf("got %s, %v; reserved is %s", l.Address, err, r.Address)
				}
			}, some...)
		})
	}
}

// Two servers take their time to look whether somebody has the address.
func TestServerThatPings(t *testing.T) {
	cfg := config4
	cfg.Ping = true
	onEach(t, cfg, func(n *lan) {
		start := time.Now()
		n.acquire(station(1), netip.Addr{})
		n.Logf("a lease took %s", time.Since(start))
	}, dhcptest.Dnsmasq, dhcptest.ISC)
}

// With no address left servers say so over IPv6, and nothing over IPv4.
func TestNoAddressLeft(t *testing.T) {
	for name, want := range map[string]error{"IPv4": ErrSilent, "IPv6": ErrRefused} {
		t.Run(name, func(t *testing.T) {
			cfg := families[name]
			cfg.Last = cfg.First
			onEach(t, cfg, func(n *lan) {
				n.acquire(station(1), netip.Addr{})
				_, err := hasty().Acquire(n.Context(), "lan0", station(2), netip.Addr{}, n.within)
				if !errors.Is(err, want) {
					n.Errorf("got %v; want %v", err, want)
				}
			})
		})
	}
}

// As many containers as an engine starts at once; fewer at a server that pings
// each address before.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		stations int
		ping     bool
	}{
		{"hundred", 100, false},
		{"slow server", 4, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cfg := config4
			cfg.Ping = tc.ping
			manyAtOnce(t, cfg, tc.stations)
		})
	}
}

func manyAtOnce(t *testing.T, cfg dhcptest.Config, stations int) {
	t.Helper()
	host, router := newLAN(t)
	n := &lan{t, dhcptest.Dnsmasq, dhcptest.Start(t, dhcptest.Dnsmasq, router, cfg), lan4}
	var c Client
	leases, errs := make([]Lease, stations), make([]error, stations)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range stations {
		wg.Go(func() {
			host.Do(func() {
				leases[i], errs[i] = c.Acquire(t.Context(), "lan0", station(i+1), netip.Addr{}, lan4)
			})
		})
	}
	wg.Wait()
	t.Logf("%d leases in %s", stations, time.Since(start))
	have := map[netip.Addr]bool{}
	for i, l := range leases {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		have[l.Address.Addr()] = true
	}
	if len(have) != stations {
		t.Errorf("%d stations have %d addresses", stations, len(have))
	}
	n.eventually(func() bool { return len(n.server.Leases()) == stations }, "not all are leased")
}
