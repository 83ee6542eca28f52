package ipam

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"pgregory.net/rapid"

	"github.com/weftnet/weft/internal/dhcp"
)

// modelServer is a DHCP server in memory, in addition to the real ones that the
// tests of internal/dhcp and cmd/weft run: only of this one it is known at every
// moment what it has leased, and to whom, so that a process may die at each. It
// hands out 10.77.0.100 to .107 of 10.77.0.0/24 for an hour.
type modelServer struct {
	step func(do func() error) error // of the process that asks; it may die there
	now  func() time.Time

	mu       sync.Mutex
	leases   map[netip.Addr]serverLease
	lose     bool          // the next acknowledgement
	hang     chan struct{} // Offer and Extend wait for it; nil: they do not
	carrier  uint32        // how often it came or went; an odd number: it is away
	stubborn netip.Addr    // is offered to everybody
	mask     int           // another than 24; 0: 24
	alone    bool          // its mask is that of one address
	declined int
	released int
	asked    int // for more time
}

type serverLease struct {
	station uint32
	until   time.Time
}

const (
	leasedSubnet = "10.77.0.0/24"
	leasedPool   = "dhcp=lan0," + leasedSubnet
	leasedSize   = 8
	stranger     = 1 // the station that is not ours
)

func (s *modelServer) address(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 77, 0, byte(100 + n)})
}

// holder is whose an address is; s.mu is held.
func (s *modelServer) holder(a netip.Addr) (uint32, bool) {
	l, ok := s.leases[a]
	return l.station, ok && s.now().Before(l.until)
}

// choose is what a station is offered; s.mu is held.
func (s *modelServer) choose(station uint32, want netip.Addr) (out netip.Addr) {
	for n := range leasedSize {
		a := s.address(n)
		holder, leased := s.holder(a)
		switch {
		case leased && holder == station:
			return a
		case !leased && (!out.IsValid() || a == want):
			out = a
		}
	}
	return out
}

func (s *modelServer) lease(a netip.Addr) dhcp.Lease {
	bits := cmp.Or(s.mask, 24)
	if s.alone {
		bits = 32
	}
	return dhcp.Lease{
		Address: netip.PrefixFrom(a, bits), Server: netip.MustParseAddr("10.77.0.1"), Router: netip.MustParseAddr("10.77.0.1"),
		Granted: s.now(), Renew: 30 * time.Minute, Rebind: 50 * time.Minute, Valid: time.Hour,
	}
}

func (s *modelServer) wait(ctx context.Context) error {
	s.mu.Lock()
	hang := s.hang
	s.mu.Unlock()
	if hang == nil {
		return nil
	}
	select {
	case <-hang:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *modelServer) Carrier(string) (uint32, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.carrier, s.carrier%2 == 0
}

func (s *modelServer) Offer(ctx context.Context, _ string, st dhcp.Station, _ bool) (dhcp.Lease, error) {
	if err := s.wait(ctx); err != nil {
		return dhcp.Lease{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lease(s.choose(st.IAID, netip.Addr{})), nil
}

func (s *modelServer) Acquire(ctx context.Context, link string, st dhcp.Station, want netip.Addr, within netip.Prefix) (dhcp.Lease, error) {
	return s.AcquireAfter(ctx, link, st, want, within, func(dhcp.Lease) error { return nil })
}

func (s *modelServer) AcquireAfter(_ context.Context, _ string, st dhcp.Station, want netip.Addr, _ netip.Prefix, first func(dhcp.Lease) error) (dhcp.Lease, error) {
	var before netip.Addr
	for {
		s.mu.Lock()
		a := s.choose(st.IAID, want)
		if s.stubborn.IsValid() {
			a = s.stubborn
		}
		l := s.lease(a)
		s.mu.Unlock()
		if !a.IsValid() {
			return dhcp.Lease{}, dhcp.ErrSilent
		}
		if want.IsValid() && a != want {
			return dhcp.Lease{}, dhcp.ErrRefused
		}
		if err := first(l); errors.Is(err, dhcp.ErrNoOffer) && a != before {
			before = a
			continue
		} else if err != nil {
			return dhcp.Lease{}, err
		}
		err := s.step(func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			if holder, leased := s.holder(a); leased && holder != st.IAID {
				return dhcp.ErrRefused
			}
			s.leases[a] = serverLease{st.IAID, l.Granted.Add(l.Valid)}
			if s.lose {
				s.lose = false
				return dhcp.ErrSilent
			}
			return nil
		})
		return l, err
	}
}

func (s *modelServer) Extend(ctx context.Context, _ string, st dhcp.Station, l dhcp.Lease) (dhcp.Lease, error) {
	s.mu.Lock()
	s.asked++
	s.mu.Unlock()
	a := l.Address.Addr()
	err := s.step(func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if holder, leased := s.holder(a); !leased || holder != st.IAID {
			return dhcp.ErrRefused
		}
		l = s.lease(a)
		s.leases[a] = serverLease{st.IAID, l.Granted.Add(l.Valid)}
		return nil
	})
	if err == nil {
		err = s.wait(ctx)
	}
	return l, err
}

func (s *modelServer) Release(_ context.Context, _ string, st dhcp.Station, l dhcp.Lease) error {
	return s.step(func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.released++
		if holder, leased := s.holder(l.Address.Addr()); leased && holder == st.IAID {
			delete(s.leases, l.Address.Addr())
		}
		return nil
	})
}

func (s *modelServer) Decline(_ context.Context, _ string, _ dhcp.Station, l dhcp.Lease) error {
	return s.step(func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.declined++
		s.leases[l.Address.Addr()] = serverLease{0, s.now().Add(time.Hour)}
		return nil
	})
}

// leasing is a house with a pool of the model server.
type leasing struct {
	*house
	server *modelServer
	f      *faulty
}

func newLeasing(tb testing.TB, options map[string]string) *leasing {
	tb.Helper()
	l := &leasing{house: newClock(tb)}
	l.wrap = func(r records) records {
		l.f = &faulty{records: r, at: -1, mode: "fail"}
		return l.f
	}
	l.server = &modelServer{leases: map[netip.Addr]serverLease{}, now: func() time.Time { return l.clock }}
	l.server.step = func(do func() error) error {
		if strings.HasPrefix(l.f.mode, "crash") {
			return l.f.call(do)
		}
		return do() // the others are faults of a disk
	}
	l.restart()
	all := map[string]string{"dhcp": "lan0"}
	maps.Copy(all, options)
	if id, err := l.pooled(leasedSubnet, all); err != nil || id != leasedPool {
		tb.Fatal(id, err)
	}
	return l
}

func (l *leasing) restart() {
	l.tb.Helper()
	l.house.restart()
	l.dhcp = l.server
}

// run does what Run does at its start and from time to time.
func (l *leasing) run() {
	for k := range l.stray {
		l.returnStrays(l.tb.Context(), k)
	}
	for range 5 { // a dead process gets nowhere
		if l.settle(l.tb.Context()) == 0 {
			break
		}
	}
	var running sync.WaitGroup
	l.extendDue(l.tb.Context(), &running)
	running.Wait()
}

func (l *leasing) only() *pool {
	return l.pool(poolKey{"dhcp=lan0", netip.MustParsePrefix(leasedSubnet)})
}

// leaked are the leases that the server has and this host knows nothing of.
func (l *leasing) leaked() (out []netip.Addr) {
	p := l.only()
	p.mu.Lock()
	defer p.mu.Unlock()
	l.server.mu.Lock()
	defer l.server.mu.Unlock()
	for a := range l.server.leases {
		holder, leased := l.server.holder(a)
		if leased && holder > stranger && !p.taken.has(a) && p.byAddr[a] == nil && !p.reserved(a) {
			out = append(out, a)
		}
	}
	return out
}

// TestLeaseCrashes is TestCrashes for addresses that a server leases, and the
// process may die as well between any question and its answer, or lose the answer.
// Others of the LAN take and leave addresses of the same server.
func TestLeaseCrashes(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		l := newLeasing(t, map[string]string{"reserve.r": "10.77.0.103"})
		live := map[netip.Addr]string{}
		name := rapid.SampledFrom([]string{"", "", "a", "b", "r"})
		doing := func(r *rapid.T, do func() string) (answer string, died bool) {
			l.f.mu.Lock()
			l.f.mode = rapid.SampledFrom([]string{"crash before", "crash after", "fail", "uncertain before", "uncertain after"}).Draw(r, "mode")
			l.f.n, l.f.at = 0, rapid.IntRange(-4, 6).Draw(r, "step")
			l.f.mu.Unlock()
			answer = do()
			if died = l.f.dead; died {
				l.restart()
			}
			l.f.at = -1
			l.run()
			return answer, died
		}
		r.Repeat(map[string]func(*rapid.T){
			"request": func(r *rapid.T) {
				who := name.Draw(r, "name")
				want := rapid.SampledFrom([]string{"", "", "10.77.0.102", "10.77.0.103"}).Draw(r, "want")
				l.server.lose = rapid.IntRange(0, 3).Draw(r, "lose") == 0
				got, _ := doing(r, func() string { return l.addressFor(leasedPool, who, want) })
				l.server.lose = false
				if strings.HasPrefix(got, "error") {
					if strings.Contains(got, "which another container of this host has") {
						r.Fatal(got)
					}
					return
				}
				p, err := netip.ParsePrefix(got)
				if err != nil || p.Bits() != 24 || p.Addr().Less(l.server.address(0)) || l.server.address(leasedSize-1).Less(p.Addr()) {
					r.Fatalf("%s is not the server's", got)
				}
				if have, ok := live[p.Addr()]; ok {
					r.Fatalf("%s for %q, and %q has it", got, who, have)
				}
				live[p.Addr()] = who
			},
			"release": func(r *rapid.T) {
				if len(live) == 0 {
					return
				}
				var have []netip.Addr
				for a := range live {
					have = append(have, a)
				}
				slices.SortFunc(have, netip.Addr.Compare)
				a := rapid.SampledFrom(have).Draw(r, "address")
				p := l.only()
				first := p.leased[a].Key == nameKey+live[a] // of the containers of that name
				if b := p.byAddr[a]; b != nil {
					first = first && b.rev != 0 // and the name is on disk
				}
				doing(r, func() string { return l.do("free " + leasedPool + " " + a.String()) })
				p = l.only()
				_, leased := l.server.holder(a)
				if b := p.byAddr[a]; first && !leased && (b != nil && b.name == live[a] || live[a] == "r" && p.reserved(a)) {
					r.Fatalf("%s is kept for %s, and not leased any more", a, live[a])
				}
				delete(live, a) // the engine never asks again
			},
			"restart": func(*rapid.T) { l.restart(); l.run() },
			"time": func(r *rapid.T) {
				l.clock = l.clock.Add(35 * time.Minute)
				doing(r, func() string { l.run(); return "" })
				l.clock = l.clock.Add(2 * time.Minute) // what was not extended is tried again
				l.run()
			},
			"strangers": func(r *rapid.T) {
				a := l.server.address(rapid.IntRange(0, leasedSize-1).Draw(r, "address"))
				l.server.mu.Lock()
				defer l.server.mu.Unlock()
				if holder, leased := l.server.holder(a); !leased {
					l.server.leases[a] = serverLease{stranger, l.clock.Add(time.Hour)}
				} else if holder == stranger {
					delete(l.server.leases, a)
				}
			},
			"": func(r *rapid.T) {
				if left := l.leaked(); len(left) > 0 {
					r.Fatalf("%v are leased, and nobody has them", left)
				}
				p := l.only()
				for a := range live {
					ours := p.leased[a]
					holder, leased := l.server.holder(a)
					if !p.taken.has(a) || ours == nil {
						r.Fatalf("%s is lost", a)
					}
					if !leased || holder != ours.Station.IAID {
						r.Fatalf("%s is in use, and the lease is that of %d", a, holder)
					}
				}
				if l.server.declined > 0 {
					r.Fatal("declined what nobody else has")
				}
			},
		})
		l.do("unpool " + leasedPool)
		if left, err := l.bolt.List(t.Context(), "ipam/"); err != nil || len(left) > 1 || left[0].Key != duidKey {
			r.Fatalf("left: %v %v", left, err)
		}
		if err := l.bolt.Close(); err != nil {
			r.Fatal(err)
		}
	})
}

// TestLeaseWritesFail: a disk that fails once costs one request, not the lease and
// not the next request, which is for the same station.
func TestLeaseWritesFail(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after"} {
		for at := range 2 { // the lease, the address
			l := newLeasing(t, nil)
			l.f.n, l.f.at, l.f.mode = 0, at, mode
			first := l.addressFor(leasedPool, "", "")
			l.f.at = -1
			if !strings.HasPrefix(first, "error") {
				t.Errorf("%s at %d: %s", mode, at, first)
			}
			l.run()
			if left := l.leaked(); len(left) > 0 {
				t.Errorf("%s at %d: left at the server: %v", mode, at, left)
			}
			if got := l.addressFor(leasedPool, "", ""); !strings.HasPrefix(got, "10.77.0.10") {
				t.Errorf("%s at %d: the next one: %s", mode, at, got)
			}
			if n := l.server.declined; n > 0 {
				t.Errorf("%s at %d: %d declined", mode, at, n)
			}
		}
	}
}

// TestLeaseTight: an address that is just being given back is offered to the next
// one, who waits for its records instead of taking the server for confused.
func TestLeaseTight(t *testing.T) {
	l := newLeasing(t, nil)
	var wg sync.WaitGroup
	for range leasedSize {
		wg.Go(func() {
			for range 30 {
				got := l.addressFor(leasedPool, "", "")
				if strings.Contains(got, dhcp.ErrRefused.Error()) || strings.Contains(got, dhcp.ErrNoOffer.Error()) {
					continue // the model offers what it has to several
				}
				if strings.HasPrefix(got, "error") {
					t.Error(got)
					return
				}
				l.do("free " + leasedPool + " " + strings.TrimSuffix(got, "/24"))
			}
		})
	}
	wg.Wait()
	if l.server.declined > 0 || len(l.leaked()) > 0 || len(l.only().leased) > 0 || len(l.only().keys) > 0 {
		t.Errorf("%d declined, leaked %v, left %v %v", l.server.declined, l.leaked(), l.only().leased, l.only().keys)
	}
}

// TestLeaseOfNobody: a request that is no longer waited for is given back, and not
// as if a station of the LAN had the address.
func TestLeaseOfNobody(t *testing.T) {
	l := newLeasing(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	l.vet = func(ctx context.Context, _ netip.Prefix, _ netip.Addr) error {
		cancel()
		return ctx.Err()
	}
	_, err := l.RequestAddress(ctx, ipam.RequestAddressRequest{PoolID: leasedPool})
	if err == nil || l.server.declined > 0 || len(l.leaked()) > 0 || l.only().taken.len() > 0 {
		t.Errorf("%v, %d declined, leaked %v, %d taken", err, l.server.declined, l.leaked(), l.only().taken.len())
	}
}

// TestReleasedWhileExtended: the question for more time comes to the server before
// the lease is given back, not after.
func TestReleasedWhileExtended(t *testing.T) {
	l := newLeasing(t, nil)
	a := strings.TrimSuffix(l.addressFor(leasedPool, "", ""), "/24")
	l.server.hang = make(chan struct{})
	l.clock = l.clock.Add(31 * time.Minute)
	var running sync.WaitGroup
	l.extendDue(t.Context(), &running)
	if got := l.do("free " + leasedPool + " " + a); got != "ok" {
		t.Error(got)
	}
	running.Wait()
	if len(l.server.leases) > 0 || len(l.only().leased) > 0 {
		t.Errorf("left %v and %v", l.server.leases, l.only().leased)
	}
	if left, err := l.bolt.List(t.Context(), leasePrefix); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// TestLeaseNotReleased: what the disk does not let go of is not asked for again and
// again.
func TestLeaseNotReleased(t *testing.T) {
	l := newLeasing(t, nil)
	a := strings.TrimSuffix(l.addressFor(leasedPool, "", ""), "/24")
	l.f.n, l.f.at, l.f.mode = 0, 0, "fail"
	if got := l.do("free " + leasedPool + " " + a); !strings.HasPrefix(got, "error") {
		t.Error(got)
	}
	l.clock = l.clock.Add(31 * time.Minute)
	if at, ok := l.nextLease(); ok {
		t.Errorf("due at %v", at)
	}
	var running sync.WaitGroup
	l.extendDue(t.Context(), &running)
	running.Wait()
	if l.server.asked > 0 {
		t.Errorf("asked %d times", l.server.asked)
	}
	l.run()
	if len(l.leaked()) > 0 || len(l.server.leases) > 0 {
		t.Errorf("left %v", l.server.leases)
	}
}

// TestLeaseClock: a lease that the clock says was granted in the future is asked for
// at once, and one that is over is counted once, however often that is found.
func TestLeaseClock(t *testing.T) {
	l := newLeasing(t, nil)
	l.addressFor(leasedPool, "", "")
	l.clock = l.clock.Add(-10 * 365 * 24 * time.Hour)
	l.restart()
	if at, ok := l.nextLease(); !ok || at.After(l.clock) {
		t.Errorf("due at %v, now is %v", at, l.clock)
	}
	l.server.step = func(func() error) error { return dhcp.ErrSilent }
	for range 70 {
		l.run()
		l.clock = l.clock.Add(time.Minute)
	}
	if c := l.only().counts; c.Expired != 1 || c.Silent < 5 {
		t.Errorf("%+v", c)
	}
}

// TestSilentSurvey: one LAN without a server does not hold up other networks.
func TestSilentSurvey(t *testing.T) {
	l := newLeasing(t, nil)
	l.server.hang = make(chan struct{})
	asked := make(chan error)
	go func() {
		_, err := l.pooled("", map[string]string{"dhcp": "lan1"})
		asked <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	for range 20 {
		if _, err := l.RequestPool(ctx, ipam.RequestPoolRequest{AddressSpace: LocalSpace}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	close(l.server.hang)
	if err := <-asked; err != nil {
		t.Error(err)
	}
}

// TestStrayOfAGonePool: the process died while it released a pool; made again it has
// nothing of the old one.
func TestStrayOfAGonePool(t *testing.T) {
	l := newLeasing(t, nil)
	l.addressFor(leasedPool, "", "")
	l.f.n, l.f.at, l.f.mode = 0, 3, "crash before" // the server's turn
	l.do("unpool " + leasedPool)
	l.restart()
	if n := len(l.Status(t.Context()).Pools); n > 0 || len(l.server.leases) != 1 {
		t.Fatalf("%d pools, leased %v", n, l.server.leases)
	}
	if id, err := l.pooled(leasedSubnet, map[string]string{"dhcp": "lan0"}); err != nil || id != leasedPool {
		t.Fatal(id, err)
	}
	if len(l.server.leases) > 0 {
		t.Errorf("left %v", l.server.leases)
	}
	got := l.addressFor(leasedPool, "", "")
	l.run()
	if len(l.server.leases) != 1 || !strings.HasPrefix(got, "10.77.0.") {
		t.Errorf("%s, leased %v", got, l.server.leases)
	}
}
