package ipam

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// slowAcquire runs something while a server is asked for an address.
type slowAcquire struct {
	*modelServer
	meanwhile func()
}

func (s slowAcquire) Acquire(ctx context.Context, link string, st dhcp.Station, want netip.Addr, within netip.Prefix) (dhcp.Lease, error) {
	s.meanwhile()
	return s.modelServer.Acquire(ctx, link, st, want, within)
}

// TestRestationAlone: while a lease is made that of another MAC address nobody asks
// for more time for it as the old one.
func TestRestationAlone(t *testing.T) {
	l := newLeasing(t, nil)
	a := netip.MustParsePrefix(l.addressFor(leasedPool, "", ""))
	l.clock = l.clock.Add(31 * time.Minute)
	l.dhcp = slowAcquire{l.server, func() {
		var running sync.WaitGroup
		l.extendDue(t.Context(), &running)
		running.Wait()
	}}
	mac := MAC{2, 0, 0, 0, 0, 9}
	if err := l.Restation(t.Context(), a.Masked(), a.Addr(), mac, nil); err != nil {
		t.Error(err)
	}
	if l.server.asked > 0 {
		t.Errorf("asked %d times for more time meanwhile", l.server.asked)
	}
	if got, ok := l.Station(a.Masked(), a.Addr()); !ok || got != mac {
		t.Errorf("station %v %v", got, ok)
	}
	if got := l.do("free " + leasedPool + " " + strings.TrimSuffix(a.String(), "/24")); got != "ok" || len(l.server.leases) > 0 {
		t.Errorf("%s, left %v", got, l.server.leases)
	}
}
