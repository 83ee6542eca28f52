package ipam

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/internal/dhcp"
)

// TestServerForgot: a server that has lost its leases offers what containers have.
// They keep it, it hears of them again, and the new container is given another.
func TestServerForgot(t *testing.T) {
	l := newLeasing(t, nil)
	var have []netip.Addr
	for _, name := range []string{"a", "b", ""} {
		have = append(have, netip.MustParsePrefix(l.addressFor(leasedPool, name, "")).Addr())
	}
	clear(l.server.leases)
	got := l.addressFor(leasedPool, "c", "")
	if got != "10.77.0.103/24" || l.server.declined > 0 {
		t.Errorf("%s, %d declined", got, l.server.declined)
	}
	p := l.only()
	for _, a := range have {
		holder, leased := l.server.holder(a)
		if !leased || holder != p.leased[a].Station.IAID || p.leased[a].trouble != "" {
			t.Errorf("%s: %v, of %d", a, leased, holder)
		}
	}
	if p.counts.Extended != 3 {
		t.Errorf("%+v", p.counts)
	}
}

// TestServerInsists: what a container has is not given up to a server that offers it
// whatever it is told.
func TestServerInsists(t *testing.T) {
	l := newLeasing(t, nil)
	a := netip.MustParsePrefix(l.addressFor(leasedPool, "a", "")).Addr()
	l.server.stubborn = a
	got := l.addressFor(leasedPool, "b", "")
	if !strings.Contains(got, "offers 10.77.0.100, which container a of this host has") || l.server.declined+l.server.released > 0 {
		t.Errorf("%s, %d declined, %d released", got, l.server.declined, l.server.released)
	}
	if holder, leased := l.server.holder(a); !leased || holder != l.only().leased[a].Station.IAID || l.only().taken.len() != 1 || len(l.only().keys) != 1 {
		t.Errorf("%v, of %d; taken %d", leased, holder, l.only().taken.len())
	}
}

// TestSquatterOffered: an address that a station of the LAN has is declined once, and
// a server that offers it again is to blame.
func TestSquatterOffered(t *testing.T) {
	l := newLeasing(t, nil)
	l.server.stubborn = netip.MustParseAddr("10.77.0.102")
	asked := 0
	l.vet = func(_ context.Context, _ netip.Prefix, a netip.Addr) error {
		asked++
		if a == l.server.stubborn {
			return errors.New("02:11:22:33:44:55 has it; take another, or make the network with -o probe=false")
		}
		return nil
	}
	l.server.step = func(do func() error) error { // it never learns
		err := do()
		clear(l.server.leases)
		return err
	}
	got := l.addressFor(leasedPool, "a", "")
	if l.server.declined != 1 || asked != 1 || !strings.Contains(got, "offers 10.77.0.102, which another station of the LAN has, and was told so") {
		t.Errorf("%d declined, %d probes: %s", l.server.declined, asked, got)
	}
	if got := l.addressFor(leasedPool, "a", "10.77.0.102"); !strings.Contains(got, "02:11:22:33:44:55 has it") {
		t.Errorf("asked for by number, it is looked for again: %s", got)
	}
	l.server.stubborn = netip.Addr{}
	if got := l.addressFor(leasedPool, "a", ""); got != "10.77.0.100/24" {
		t.Error(got)
	}
	if len(l.only().leased) != 1 || l.only().taken.len() != 1 {
		t.Errorf("%v, %d taken", l.only().leased, l.only().taken.len())
	}
}

// TestRefusedIsNotReleased: the server that refused knows of no lease to be released.
func TestRefusedIsNotReleased(t *testing.T) {
	l := newLeasing(t, nil)
	l.server.step = func(func() error) error { return dhcp.ErrRefused }
	if got := l.addressFor(leasedPool, "a", ""); !strings.Contains(got, dhcp.ErrRefused.Error()) {
		t.Error(got)
	}
	l.run()
	if l.server.released+l.server.declined > 0 || l.only().taken.len() > 0 || len(l.only().leased) > 0 {
		t.Errorf("%d released, %d declined, %d taken", l.server.released, l.server.declined, l.only().taken.len())
	}
}

// patience notes how long it may take to answer.
type patience struct {
	*modelServer
	until []time.Time
}

func (s *patience) Offer(ctx context.Context, link string, st dhcp.Station, six bool) (dhcp.Lease, error) {
	end, _ := ctx.Deadline()
	s.until = append(s.until, end)
	return s.modelServer.Offer(ctx, link, st, six)
}

func (s *patience) AcquireAfter(ctx context.Context, link string, st dhcp.Station, want netip.Addr, within netip.Prefix, first func(dhcp.Lease) error) (dhcp.Lease, error) {
	end, _ := ctx.Deadline()
	s.until = append(s.until, end)
	return s.modelServer.AcquireAfter(ctx, link, st, want, within, first)
}

// TestServerBeforeTheCall: a server has less time than the call, whose answer is to say
// what it did.
func TestServerBeforeTheCall(t *testing.T) {
	l := newLeasing(t, nil)
	s := &patience{modelServer: l.server}
	l.dhcp = s
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	end, _ := ctx.Deadline()
	if _, err := l.RequestAddress(ctx, ipam.RequestAddressRequest{PoolID: leasedPool}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.RequestPool(ctx, ipam.RequestPoolRequest{AddressSpace: LocalSpace, Options: map[string]string{"dhcp": "lan1"}}); err != nil {
		t.Fatal(err)
	}
	for _, got := range s.until {
		if got.IsZero() || end.Sub(got) < answerTime {
			t.Errorf("it has until %v, the call until %v", got, end)
		}
	}
	if len(s.until) != 2 {
		t.Errorf("asked %d times", len(s.until))
	}
}

// TestMaskOfOne: a server whose mask is that of one address, as with some providers, is
// believed in all else where the subnet is given.
func TestMaskOfOne(t *testing.T) {
	l := newLeasing(t, nil)
	l.server.alone = true
	if _, err := l.pooled("", map[string]string{"dhcp": "lan2"}); err == nil || !strings.Contains(err.Error(), "offered 10.77.0.100 with the mask of one address: give the LAN's subnet with --subnet") {
		t.Error(err)
	}
	if _, err := l.pooled("10.78.0.0/24", map[string]string{"dhcp": "lan2"}); err == nil || !strings.Contains(err.Error(), "offered 10.77.0.100, which is not in 10.78.0.0/24") {
		t.Error(err)
	}
	id, err := l.pooled(leasedSubnet, map[string]string{"dhcp": "lan2"})
	if err != nil {
		t.Fatal(err)
	}
	if got := l.addressFor(id, "a", ""); got != "10.77.0.100/24" {
		t.Error(got)
	}
}

// TestMaskOfMany: a server whose mask covers other networks by now does not have it.
func TestMaskOfMany(t *testing.T) {
	l := newLeasing(t, nil)
	for _, mask := range []int{1, 8, 31} {
		l.server.mask = mask
		if got := l.addressFor(leasedPool, "", ""); !strings.HasSuffix(got, "/24") {
			t.Errorf("mask /%d: %s", mask, got)
		}
	}
}

// TestRefusedForOurs: an address that is asked for by number and that a container has is
// refused with its name, and status shows the router that the server names.
func TestRefusedForOurs(t *testing.T) {
	l := newLeasing(t, nil)
	l.addressFor(leasedPool, "a", "10.77.0.105")
	if got := l.addressFor(leasedPool, "b", "10.77.0.105"); !strings.Contains(got, "address 10.77.0.105 of pool 10.77.0.0/24 is that of container a of this host") {
		t.Error(got)
	}
	l.server.leases[netip.MustParseAddr("10.77.0.106")] = serverLease{stranger, l.clock.Add(time.Hour)}
	l.vet = func(context.Context, netip.Prefix, netip.Addr) error { return errors.New("it is this host's own") }
	if got := l.addressFor(leasedPool, "b", "10.77.0.106"); !strings.Contains(got, "it is this host's own") {
		t.Error(got)
	}
	l.vet = nil
	if got := l.addressFor(leasedPool, "b", "10.77.0.106"); !strings.Contains(got, dhcp.ErrRefused.Error()) {
		t.Error(got)
	}
	if s := l.Status(t.Context()).Pools; len(s) != 1 || s[0].Gateway != "10.77.0.1" {
		t.Errorf("%+v", s)
	}
}
