package ipam

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/internal/plugin"
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

func (s *slowPut) wait(key string) {
	if key == s.key {
		s.once.Do(func() {
			close(s.came)
			<-s.goes
		})
	}
}

func (s *slowPut) Put(ctx context.Context, r store.Record) (store.Record, error) {
	s.wait(r.Key)
	return s.records.Put(ctx, r)
}

func (s *slowPut) Write(ctx context.Context, b store.Batch) (store.Record, error) {
	if b.Put != nil {
		s.wait(b.Put.Key)
	}
	return s.records.Write(ctx, b)
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
	select {
	case <-slow.came:
	case got := <-first:
		t.Fatalf("a has %s without a write", got)
	}
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

// TestGrantedTooLate: an address whose request ends after the engine was told that there
// is none is free again, and the name's next time.
func TestGrantedTooLate(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/29")
	key := poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/29")}
	for name, want := range map[string]string{"a": "", "b": "10.1.0.6"} {
		good := h.store
		slow := newSlowPut(good, key.name(name)) // after the address
		h.store = slow
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			_, err := h.RequestAddress(ctx, ipam.RequestAddressRequest{
				PoolID: id, Address: want, Options: map[string]string{plugin.OptionEndpointName: name},
			})
			done <- err
		}()
		select {
		case <-slow.came:
		case err := <-done:
			t.Fatalf("want %q: answered without a write: %v", want, err)
		}
		cancel() // the call's time is over
		close(slow.goes)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("want %q: %v", want, err)
		}
		h.store = good
		if n := h.Status(t.Context()).Pools[0].Used; n != 0 {
			t.Errorf("want %q: %d used", want, n)
		}
		if left, err := h.bolt.List(t.Context(), addressPrefix); err != nil || len(left) > 0 {
			t.Errorf("want %q: left on disk %v, %v", want, left, err)
		}
		if got := h.addressFor(id, name, want); got != map[string]string{"a": "10.1.0.1/29", "b": "10.1.0.6/29"}[name] {
			t.Errorf("want %q, the next time: %s", want, got)
		}
		h.do("free " + id + " 10.1.0.1")
		h.do("free " + id + " 10.1.0.6")
	}
}
