package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/internal/store"
)

// TestFreshLease: a lease whose request has not ended yet is not given back because
// its endpoint is not there, also where all of a link are asked for at that moment.
func TestFreshLease(t *testing.T) {
	l := newLeasing(t, nil)
	l.inhabited(leasedSubnet)
	l.vet = func(context.Context, netip.Prefix, netip.Addr) error { // which takes some time
		l.only().hasten(l.clock, func(*leased) bool { return true }) // the carrier is back
		l.run()
		return nil
	}
	a, _, _ := strings.Cut(l.addressFor(leasedPool, "", ""), "/")
	if addr, err := netip.ParseAddr(a); err != nil || !l.only().taken.has(addr) || len(l.server.leases) != 1 || l.server.released != 0 {
		t.Errorf("granted %s, leased %v, %d released", a, l.server.leases, l.server.released)
	}
}

// TestOptionsOfBefore: the record of a release that did not write down which of the
// networks gave the options keeps them as long as one of those is there.
func TestOptionsOfBefore(t *testing.T) {
	h := newHouse(t)
	a := h.do("pool local 10.1.0.0/24 sub 10.1.0.64/26 reserve.web=10.1.0.100")
	b := h.do("pool local 10.1.0.0/24 sub 10.1.0.128/25 reserve.web=10.1.0.100")
	list, err := h.bolt.List(t.Context(), poolPrefix)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	var rec poolRecord
	if err := json.Unmarshal(list[0].Value, &rec); err != nil || len(rec.Gave) != 2 {
		t.Fatal(rec, err)
	}
	rec.Gave = nil
	v, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.bolt.Put(t.Context(), store.Record{Key: list[0].Key, Value: v, Rev: list[0].Rev}); err != nil {
		t.Fatal(err)
	}
	h.restart()
	h.do("unpool " + b)
	h.restart()
	if got := h.addressFor(a, "web", ""); got != "10.1.0.100/24" {
		t.Errorf("web has %s", got)
	}
}

// TestHistoryOfTakenOver: an address that could not be freed and is handed out again
// was somebody's until then.
func TestHistoryOfTakenOver(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/24")
	h.addressFor(id, "web", "10.1.0.9")
	h.after(time.Minute)
	good := h.store
	h.store = &faulty{records: good, at: 0, mode: "fail"}
	if got := h.do("free " + id + " 10.1.0.9"); !strings.HasPrefix(got, "error") {
		t.Fatal(got)
	}
	h.store = good
	h.after(time.Minute)
	if got := h.addressFor(id, "db", "10.1.0.9"); got != "10.1.0.9/24" {
		t.Fatal(got)
	}
	h.wantPast("one after the other", Query{}, "10.1.0.9 web   0 2", "10.1.0.9 db   2 now")
	if err := h.history.flush(t.Context(), h.store); err != nil {
		t.Fatal(err)
	}
	h.restart()
	h.wantPast("after a restart", Query{}, "10.1.0.9 web   0 2", "10.1.0.9 db   2 now")
}

// bounded notes deletions that would wait for a disk for ever.
type bounded struct {
	records
	deleted, endless int
}

func (s *bounded) Write(ctx context.Context, b store.Batch) (store.Record, error) {
	if len(b.Delete) > 0 {
		s.deleted++
		if _, ok := ctx.Deadline(); !ok {
			s.endless++
		}
	}
	return s.records.Write(ctx, b)
}

// TestTakenBackInTime: what is handed out and taken back within one call is taken back
// in bounded time, although the call's own may be over.
func TestTakenBackInTime(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/24")
	s := &bounded{records: h.store}
	h.store = s
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for n, vet := range []error{errors.New("somebody has it"), nil} {
		h.vet = func(context.Context, netip.Prefix, netip.Addr) error {
			if vet == nil {
				cancel()
			}
			return vet
		}
		if _, err := h.RequestAddress(ctx, ipam.RequestAddressRequest{PoolID: id, Address: "10.1.0.9"}); err == nil || s.deleted != n+1 || s.endless != 0 {
			t.Errorf("%v: %d deletions, %d of them without an end", err, s.deleted, s.endless)
		}
	}
}
