package ipam

import (
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// TestLeasesOfASleeper: the server's clock goes on while this machine sleeps, and
// what Go measures does not.
func TestLeasesOfASleeper(t *testing.T) {
	l := newLeasing(t, nil)
	slept := 3 * time.Hour // before the process started: of no account
	l.asleep = func() time.Duration { return slept }
	l.addressFor(leasedPool, "", "")
	last := look{slept: l.asleep()}
	l.lookAround(&last)
	if at, ok := l.nextLease(); !ok || !at.Equal(l.clock.Add(30*time.Minute)) {
		t.Fatalf("due at %v, now is %v", at, l.clock)
	}
	// Half an hour awake and asleep in turn: half of the lease.
	l.clock = l.clock.Add(10 * time.Minute)
	slept += 20 * time.Minute
	for range 2 { // sleep counts once
		l.lookAround(&last)
		if at, ok := l.nextLease(); !ok || !at.Equal(l.clock) {
			t.Errorf("due at %v, now is %v", at, l.clock)
		}
	}
	var running sync.WaitGroup
	l.extendDue(t.Context(), &running)
	running.Wait()
	if l.server.asked != 1 {
		t.Errorf("asked %d times for more time", l.server.asked)
	}
	// A night: it is over, and asked for as a new one.
	slept += 8 * time.Hour
	l.lookAround(&last)
	p := l.only()
	for _, x := range p.leased {
		if end := x.expires(); !end.Equal(l.clock.Add(-7 * time.Hour)) {
			t.Errorf("ends %v, now is %v", end, l.clock)
		}
	}
	l.extendDue(t.Context(), &running)
	running.Wait()
	if at, ok := l.nextLease(); !ok || !at.Equal(l.clock.Add(30*time.Minute)) || l.server.asked != 1 {
		t.Errorf("due at %v, now is %v, asked %d times for more time", at, l.clock, l.server.asked)
	}
}

// due is how many leases are asked for within d from now.
func (l *leasing) due(d time.Duration) (n int) {
	for _, x := range l.only().leased {
		if !x.next.After(l.clock.Add(d)) {
			n++
		}
	}
	return n
}

// TestLeasesAfterCarrier: a link that was unplugged may be in another LAN now. All
// of its leases are asked for, but not all at the same time.
func TestLeasesAfterCarrier(t *testing.T) {
	l := newLeasing(t, nil)
	for range leasedSize {
		l.addressFor(leasedPool, "", "")
	}
	last := look{}
	look := func(carrier uint32, want int) {
		t.Helper()
		l.server.carrier = carrier
		l.lookAround(&last)
		if n := l.due(0); n != want {
			t.Errorf("carrier %d: %d leases are due, not %d", carrier, n, want)
		}
	}
	look(6, 0) // seen for the first time
	look(6, 0)
	look(7, 0) // away: nobody would answer
	look(8, extendAtOnce)
	l.run()
	look(8, 0)
	look(10, extendAtOnce) // away and back between two looks
}

// TestLeasesAreSpread: no more are asked for in a second than a server stands.
func TestLeasesAreSpread(t *testing.T) {
	now := time.Unix(1e9, 0)
	p := newPool(poolID{})
	for n := range 3 * extendAtOnce {
		a := (*modelServer)(nil).address(n)
		p.leased[a] = &leased{next: now.Add(time.Hour)}
	}
	p.hasten(now, func(*leased) bool { return true })
	for _, tc := range []struct {
		within time.Duration
		want   int
	}{{0, extendAtOnce}, {time.Second, 2 * extendAtOnce}, {2 * time.Second, 3 * extendAtOnce}} {
		n := 0
		for _, l := range p.leased {
			if !l.next.After(now.Add(tc.within)) {
				n++
			}
		}
		if n != tc.want {
			t.Errorf("%d leases are due within %s, not %d", n, tc.within, tc.want)
		}
	}
}

// TestServerIsBack: the first lease that it extends is news for the others, which
// would wait for up to half of the time that they have left.
func TestServerIsBack(t *testing.T) {
	l := newLeasing(t, nil)
	l.addressFor(leasedPool, "", "")
	l.clock = l.clock.Add(5 * time.Minute)
	l.addressFor(leasedPool, "", "")
	answers := l.server.step
	l.server.step = func(func() error) error { return dhcp.ErrSilent }
	l.clock = l.clock.Add(30 * time.Minute)
	l.run() // of both: the first has 25 minutes left, the other 30
	if n := l.due(12 * time.Minute); n != 0 {
		t.Fatalf("%d leases are asked for again at once", n)
	}
	l.server.step = answers
	l.clock = l.clock.Add(13 * time.Minute)
	l.run() // the first is extended
	if n := l.due(0); n != 1 {
		t.Errorf("%d leases are due, not the other one", n)
	}
	l.run()
	if n := l.due(20 * time.Minute); n != 0 {
		t.Errorf("%d leases are due again", n)
	}
}
