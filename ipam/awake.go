package ipam

import (
	"strings"
	"time"
)

// lookTime is how often the loop of the leases sees whether the machine slept or
// a link got its carrier back. Timers stand still while it sleeps, too.
const lookTime = 10 * time.Second

// look is what the loop of the leases remembers of the last time.
type look struct {
	slept   time.Duration
	carrier map[string]uint32 // by link: how often its carrier came or went
}

// lookAround has leases grow older by the time for which the machine slept, and
// asks for those of a link anew whose carrier was away: it may be plugged into
// another LAN, or the server may have restarted with the switch.
func (i *IPAM) lookAround(last *look) {
	now, total := i.now(), i.asleep()
	slept := total - last.slept
	last.slept = total
	before := last.carrier
	last.carrier = make(map[string]uint32, len(before))
	for _, p := range i.leasedPools() {
		if slept >= time.Second {
			p.overslept(now, slept)
		}
		link := p.dhcp()
		n, up := i.dhcp.Carrier(link)
		if !up { // it is looked at again when it is
			n = before[link]
		}
		last.carrier[link] = n
		if old, known := before[link]; known && n != old {
			p.hasten(now, func(*leased) bool { return true })
		}
	}
}

// overslept makes the leases of a pool older.
func (p *pool) overslept(now time.Time, slept time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.leased {
		left := l.next.Sub(now)
		l.Lease.Granted = now.UTC().Add(-now.Sub(l.Lease.Granted) - slept)
		l.next = now.Add(left - slept)
	}
}

// hasten has leases of a pool asked for at once, extendAtOnce of them a second.
func (p *pool) hasten(now time.Time, which func(*leased) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, l := range p.leased {
		if !which(l) {
			continue
		}
		if at := now.Add(time.Duration(n/extendAtOnce) * time.Second); at.Before(l.next) {
			l.next = at
		}
		n++
	}
}

// unanswered reports whether a lease waits for a server that was silent.
func (l *leased) unanswered() bool {
	return l.trouble != "" && !strings.HasPrefix(l.trouble, refused)
}
