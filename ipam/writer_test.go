package ipam

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// counted counts batches.
type counted struct {
	records
	n atomic.Int32
}

func (s *counted) Write(ctx context.Context, b store.Batch) (store.Record, error) {
	s.n.Add(1)
	return s.records.Write(ctx, b)
}

// TestWriterIsLazy: which endpoints have addresses is written together, as each commit
// is one that the next request waits for; and all is there at the end.
func TestWriterIsLazy(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/24")
	pool := netip.MustParsePrefix("10.1.0.0/24")
	const containers = 40
	a := pool.Addr()
	for range containers {
		h.do("addr " + id)
	}
	s := &counted{records: h.store}
	h.store = s
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- h.writeHistory(ctx) }()
	for range containers {
		a = a.Next()
		h.Assigned(pool, a, "endpoint of "+a.String(), MAC{})
		time.Sleep(2 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := s.n.Load(); n > containers/4 {
		t.Errorf("%d writes", n)
	}
	h.restart()
	list, err := h.History(t.Context(), Query{})
	for _, e := range list {
		if e.Endpoint != "endpoint of "+e.Address.String() {
			t.Errorf("%s: endpoint %q", e.Address, e.Endpoint)
		}
	}
	if err != nil || len(list) != containers {
		t.Errorf("%d, %v", len(list), err)
	}
}
