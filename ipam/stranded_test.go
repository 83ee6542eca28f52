package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// newStranded is a house with a full pool of six addresses that no endpoint has, for
// an hour.
func newStranded(t *testing.T) (h *house, id string) {
	t.Helper()
	h = newHouse(t)
	id = h.do("pool local 10.1.0.0/29")
	for range 6 {
		h.do("addr " + id)
	}
	h.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(netip.Addr) string { return "" }, true
	}
	h.now = func() time.Time { return time.Now().Add(time.Hour) }
	return h, id
}

// onDelete runs something after each address that is freed.
type onDelete struct {
	records
	do func(key string)
}

func (s onDelete) Write(ctx context.Context, b store.Batch) (store.Record, error) {
	r, err := s.records.Write(ctx, b)
	for _, key := range b.Delete {
		s.do(key)
	}
	return r, err
}

// TestStrandedGrantedAgain: what was stranded, and is given to somebody while others
// are being freed, is not freed again.
func TestStrandedGrantedAgain(t *testing.T) {
	h, id := newStranded(t)
	good, h2, last := h.store, h, netip.MustParseAddr("10.1.0.6")
	key := poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/29")}
	h.store = onDelete{good, func(k string) {
		if k != key.address(netip.MustParseAddr("10.1.0.1")) {
			return
		}
		h2.do("free " + id + " " + last.String())
		h2.now = time.Now // it has it from now on
		if got := h2.do("addr " + id + " " + last.String()); got != last.String()+"/29" {
			t.Error(got)
		}
	}}
	if _, err := h.Carry(t.Context(), Order{Do: "release", Stranded: true}); err != nil {
		t.Error(err)
	}
	if !h.pool(key).taken.has(last) {
		t.Errorf("%s was taken away from who was given it just now", last)
	}
}

// TestStrandedOne: a container that needs an address does not wait until all that
// are stranded are free.
func TestStrandedOne(t *testing.T) {
	h, id := newStranded(t)
	if got := h.do("addr " + id); got != "10.1.0.1/29" {
		t.Error(got)
	}
	if n := h.Status(t.Context()).Pools[0].Used; n != 6 {
		t.Errorf("%d used, want 6", n)
	}
}

// TestStrandedClock: a clock that is set forward makes no address old.
func TestStrandedClock(t *testing.T) {
	h, _ := newStranded(t)
	list, err := h.bolt.List(t.Context(), addressPrefix)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list { // as if it had been two hours earlier then
		at := strings.Index(string(r.Value), `"Created":"`)
		v := string(r.Value[:at]) + fmt.Sprintf(`"Created":%q}`, time.Now().Add(-2*time.Hour).UTC().Format(time.RFC3339))
		if _, err := h.bolt.Put(t.Context(), store.Record{Key: r.Key, Value: []byte(v), Rev: r.Rev}); err != nil {
			t.Fatal(err)
		}
	}
	h.now = time.Now
	if s := h.Status(t.Context()).Pools[0].Stranded; s != nil {
		t.Errorf("stranded: %v", s)
	}
}

// TestStrandedFails: an order that fails in the middle says what it has done.
func TestStrandedFails(t *testing.T) {
	h, _ := newStranded(t)
	h.store = &faulty{records: h.store, at: 2, mode: "fail"}
	_, err := h.Carry(t.Context(), Order{Do: "release", Stranded: true})
	if err == nil || !strings.Contains(err.Error(), "free again: 10.1.0.1 before that") {
		t.Error(err)
	}
}

// TestBackUnreadable: what is only a hint does not keep the plugin from starting.
func TestBackUnreadable(t *testing.T) {
	for _, v := range []string{"{", `{"Version":9}`} {
		h := newHouse(t)
		if _, err := h.bolt.Put(t.Context(), store.Record{Key: backKey, Value: []byte(v)}); err != nil {
			t.Fatal(err)
		}
		h.restart()
		if left, err := h.bolt.List(t.Context(), backKey); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
	}
}
