package ipam

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// mute is a server that can be switched off.
type mute struct {
	*modelServer
	off   bool
	asked int
}

func (m *mute) AcquireAfter(ctx context.Context, link string, s dhcp.Station, want netip.Addr, within netip.Prefix, first func(dhcp.Lease) error) (dhcp.Lease, error) {
	m.asked++
	if m.off {
		return dhcp.Lease{}, dhcp.ErrSilent
	}
	return m.modelServer.AcquireAfter(ctx, link, s, want, within, first)
}

// TestFallback: while the server is silent, containers get addresses of the range
// that was named for it, and theirs of the server again when it is back.
func TestFallback(t *testing.T) {
	l := newLeasing(t, map[string]string{"dhcp_fallback": "10.77.0.240/30", "reserve.r": "10.77.0.103"})
	m := &mute{modelServer: l.server, off: true}
	l.dhcp = m
	get := func(what, name, want, expect string) string {
		t.Helper()
		got := l.addressFor(leasedPool, name, want)
		if !strings.HasPrefix(got, expect) {
			t.Errorf("%s: %s, want %s", what, got, expect)
		}
		return strings.TrimSuffix(got, "/24")
	}
	free := func(a string) {
		t.Helper()
		if got := l.do("free " + leasedPool + " " + a); got != "ok" {
			t.Error(got)
		}
	}
	web := get("the first one", "web", "", "10.77.0.240/24")
	get("another", "", "", "10.77.0.241/24")
	if m.asked != 1 {
		t.Errorf("a server that is silent was asked %d times", m.asked)
	}
	get("asked for in the range", "", "10.77.0.243", "10.77.0.243/24")
	m.asked = 0
	get("asked for elsewhere", "", "10.77.0.101", "error: "+dhcp.ErrSilent.Error())
	get("reserved", "r", "", "10.77.0.103/24")
	if w := l.Status(t.Context()).Pools[0].Warning; !strings.Contains(w, "4 addresses are of dhcp_fallback") {
		t.Errorf("status: %q", w)
	}
	for _, e := range l.log.AllEntries() {
		if strings.Contains(e.Message, "10.77.0.240 of dhcp_fallback until it is made again") {
			m.asked = -1
		}
	}
	if m.asked != -1 {
		t.Error("nothing was logged")
	}

	// The same again after a restart, and for the name.
	l.restart()
	l.dhcp = m
	free(web)
	get("made again", "web", "", "10.77.0.240/24")
	get("the last one", "", "", "10.77.0.242/24")
	get("one more", "", "", "error: "+dhcp.ErrSilent.Error()+"; and of dhcp_fallback=10.77.0.240/30: no free address left")

	// The server is back: at once for what is asked for elsewhere, for others within
	// the time for which it is not asked again.
	m.off = false
	l.clock = l.clock.Add(silentTime)
	free(web)
	get("with the server, made again", "web", "", "10.77.0.10")
	if left := l.leaked(); len(left) > 0 {
		t.Errorf("leaked %v", left)
	}
	l.do("unpool " + leasedPool)
}

// TestFallbackSquatted: an address that a station of the LAN has is not given out, nor
// asked for again and again.
func TestFallbackSquatted(t *testing.T) {
	l := newLeasing(t, map[string]string{"dhcp_fallback": "10.77.0.240/29"})
	l.dhcp = &mute{modelServer: l.server, off: true}
	vetted := 0
	l.vet = func(_ context.Context, _ netip.Prefix, a netip.Addr) error {
		vetted++
		if a.As4()[3] < 242 {
			return errors.New("somebody has " + a.String())
		}
		return nil
	}
	for _, name := range []string{"web", "web"} {
		got := l.addressFor(leasedPool, name, "")
		if got != "10.77.0.242/24" || vetted > 3 {
			t.Errorf("%s after %d questions", got, vetted)
		}
		l.do("free " + leasedPool + " 10.77.0.242")
		l.clock = l.clock.Add(time.Second)
		vetted = 0
	}
	if l.server.declined > 0 {
		t.Error("a server that is silent was told of it")
	}
}

// TestFallbackRange: it is one of the subnet.
func TestFallbackRange(t *testing.T) {
	l := newLeasing(t, nil)
	for _, c := range [][2]string{{"10.78.0.0/28", "is not a range of subnet 10.77.0.0/24"}, {"10.77.0.0/32", "has a usable address"}, {"fd00::/120", ""}, {"refuse", ""}, {"10.77.0.0/24", ""}} {
		id, err := l.pooled(leasedSubnet, map[string]string{"dhcp": "lan1", "dhcp_fallback": c[0]})
		if (err == nil) != (c[1] == "") || err != nil && !strings.Contains(err.Error(), c[1]) {
			t.Errorf("%s: %v, want %s", c[0], err, c[1])
		}
		if err == nil {
			l.do("unpool " + id)
		}
	}
}
