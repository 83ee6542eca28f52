package ipam

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// slowPut has the first write of the record under a key wait.
type slowPut struct {
	records
	key  string
	once sync.Once
	came chan struct{} // closed when it is there
	goes chan struct{} // closed when it may go on
}

func newSlowPut(r records, key string) *slowPut {
	return &slowPut{records: r, key: key, came: make(chan struct{}), goes: make(chan struct{})}
}

func (s *slowPut) Put(ctx context.Context, r store.Record) (store.Record, error) {
	if r.Key == s.key {
		s.once.Do(func() {
			close(s.came)
			<-s.goes
		})
	}
	return s.records.Put(ctx, r)
}

// TestKeptWhileWritten: in a pool that has nothing but addresses that rest, the one
// that is just being given to its name is not given to another container.
func TestKeptWhileWritten(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/29")
	h.do("gw " + id)
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		a := strings.TrimSuffix(h.addressFor(id, name, ""), "/29")
		defer h.do("free " + id + " " + a)
	}
	h.do("free " + id + " 10.1.0.2") // a's, before all others
	h.do("free " + id + " 10.1.0.3")
	key := poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/29")}
	slow := newSlowPut(h.store, key.address(netip.MustParseAddr("10.1.0.2")))
	h.store = slow
	first := make(chan string)
	go func() { first <- h.addressFor(id, "a", "") }()
	<-slow.came
	second := make(chan string)
	go func() { second <- h.do("addr " + id) }()
	select {
	case got := <-second:
		if got != "10.1.0.3/29" {
			t.Errorf("the other one: %s", got)
		}
		close(slow.goes)
	case <-time.After(5 * time.Second): // both write one record
		close(slow.goes)
		t.Errorf("the other one waited, and has %s", <-second)
	}
	if got := <-first; got != "10.1.0.2/29" {
		t.Errorf("a has %s", got)
	}
}
