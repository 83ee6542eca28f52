// Package storetest is what every store of records must pass.
//
// It owns the tests, never a store. It holds no lock. Entry point: [Run].
package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weftnet/weft/internal/store"
)

// Store is the whole of a store.
type Store interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Get(ctx context.Context, key string) (store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Delete(ctx context.Context, key string) error
	DeletePrefix(ctx context.Context, prefix string) error
}

// Run runs the suite. open returns an empty store.
func Run(t *testing.T, open func(t *testing.T) Store) {
	t.Helper()
	for name, f := range map[string]func(*testing.T, Store){
		"create": testCreate, "swap": testSwap, "delete": testDelete, "list": testList,
		"delete prefix": testDeletePrefix, "values": testValues, "limits": testLimits,
		"one winner": testOneWinner, "counter": testCounter, "order": testOrder, "context": testContext,
	} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

func put(t *testing.T, s Store, key, value string, rev uint64) store.Record {
	t.Helper()
	r, err := s.Put(t.Context(), store.Record{Key: key, Value: []byte(value), Rev: rev})
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
	if r.Rev == 0 || r.Rev == rev {
		t.Fatalf("put %s at revision %d returned revision %d", key, rev, r.Rev)
	}
	return r
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func wantGet(t *testing.T, s Store, want store.Record) {
	t.Helper()
	got, err := s.Get(t.Context(), want.Key)
	if err != nil {
		t.Fatalf("get %s: %v", want.Key, err)
	}
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("get %s (-want +got):\n%s", want.Key, d)
	}
}

func testCreate(t *testing.T, s Store) {
	t.Helper()
	_, err := s.Get(t.Context(), "a")
	wantErr(t, "get of nothing", err, store.ErrNotFound)
	r := put(t, s, "a", "1", 0)
	wantGet(t, s, r)
	_, err = s.Put(t.Context(), store.Record{Key: "a", Value: []byte("2")})
	wantErr(t, "create twice", err, store.ErrExists)
	wantGet(t, s, r)
}

func testSwap(t *testing.T, s Store) {
	t.Helper()
	_, err := s.Put(t.Context(), store.Record{Key: "a", Value: []byte("1"), Rev: 7})
	wantErr(t, "swap of nothing", err, store.ErrNotFound)
	r1 := put(t, s, "a", "1", 0)
	r2 := put(t, s, "a", "2", r1.Rev)
	wantGet(t, s, r2)
	_, err = s.Put(t.Context(), store.Record{Key: "a", Value: []byte("3"), Rev: r1.Rev})
	wantErr(t, "swap of an old revision", err, store.ErrConflict)
	wantGet(t, s, r2)
}

func testDelete(t *testing.T, s Store) {
	t.Helper()
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Errorf("delete of nothing: %v", err)
	}
	r1 := put(t, s, "a", "1", 0)
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	_, err := s.Get(t.Context(), "a")
	wantErr(t, "get after delete", err, store.ErrNotFound)
	r2 := put(t, s, "a", "1", 0)
	if r2.Rev <= r1.Rev {
		t.Errorf("made again with revision %d, after %d", r2.Rev, r1.Rev)
	}
	_, err = s.Put(t.Context(), store.Record{Key: "a", Value: []byte("2"), Rev: r1.Rev})
	wantErr(t, "swap with the revision of the deleted record", err, store.ErrConflict)
}

func testList(t *testing.T, s Store) {
	t.Helper()
	var want []store.Record
	for _, k := range []string{"a", "b/1", "b/2", "b0", "c"} {
		r := put(t, s, k, "value of "+k, 0)
		if k[0] == 'b' && k[1] == '/' {
			want = append(want, r)
		}
	}
	for _, c := range []struct {
		prefix string
		want   []store.Record
	}{{"b/", want}, {"b/2", want[1:]}, {"x", nil}} {
		got, err := s.List(t.Context(), c.prefix)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("list %q (-want +got):\n%s", c.prefix, d)
		}
	}
	if all, err := s.List(t.Context(), ""); err != nil || len(all) != 5 {
		t.Errorf("list of everything: %d records, error %v, want 5", len(all), err)
	}
}

func testDeletePrefix(t *testing.T, s Store) {
	t.Helper()
	const n = 12_000 // more than one transaction of the embedded store
	var wg sync.WaitGroup
	for w := range 64 {
		wg.Go(func() {
			for i := w; i < n; i += 64 {
				if _, err := s.Put(t.Context(), store.Record{Key: fmt.Sprintf("p/%05d", i)}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	put(t, s, "o", "stays", 0)
	put(t, s, "p0", "stays", 0) // '0' follows '/'
	for range 2 {               // the second time there is nothing left
		if err := s.DeletePrefix(t.Context(), "p/"); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Key != "o" || all[1].Key != "p0" {
		t.Errorf("%d records left, want o and p0: %.300v", len(all), all)
	}
	if s.DeletePrefix(t.Context(), "") == nil {
		t.Error("deleting every record there is was not refused")
	}
}

func testValues(t *testing.T, s Store) {
	t.Helper()
	for i, v := range []string{"", "\x00", string(make([]byte, 100_000)), "{}"} {
		r := put(t, s, fmt.Sprintf("k%d", i), v, 0)
		wantGet(t, s, r)
	}
	value := []byte("mine")
	r, err := s.Put(t.Context(), store.Record{Key: "k", Value: value})
	if err != nil {
		t.Fatal(err)
	}
	copy(value, "gone")
	wantGet(t, s, store.Record{Key: "k", Value: []byte("mine"), Rev: r.Rev})
}

func testLimits(t *testing.T, s Store) {
	t.Helper()
	for _, r := range []store.Record{{Key: ""}, {Key: string(make([]byte, 2000))}, {Key: "k", Value: make([]byte, 2<<20)}} {
		if _, err := s.Put(t.Context(), r); err == nil {
			t.Errorf("key of %d and value of %d bytes were taken", len(r.Key), len(r.Value))
		}
	}
}

// testOneWinner lets many create the same records at once.
func testOneWinner(t *testing.T, s Store) {
	t.Helper()
	const callers, keys = 32, 20
	var mu sync.Mutex
	won := map[string]int{}
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for k := range keys {
				key := fmt.Sprintf("k%d", k)
				_, err := s.Put(t.Context(), store.Record{Key: key, Value: fmt.Appendf(nil, "%d", c)})
				switch {
				case err == nil:
					mu.Lock()
					won[key]++
					mu.Unlock()
				case !errors.Is(err, store.ErrExists):
					t.Errorf("create: %v", err)
				}
			}
		})
	}
	wg.Wait()
	for k := range keys {
		if n := won[fmt.Sprintf("k%d", k)]; n != 1 {
			t.Errorf("k%d was created %d times", k, n)
		}
	}
}

// testCounter lets many add to one number by compare-and-swap.
func testCounter(t *testing.T, s Store) {
	t.Helper()
	const callers, times = 8, 25
	put(t, s, "n", "0", 0)
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for done := 0; done < times; {
				r, err := s.Get(t.Context(), "n")
				if err != nil {
					t.Error(err)
					return
				}
				var n int
				if _, err := fmt.Sscan(string(r.Value), &n); err != nil {
					t.Error(err)
					return
				}
				r.Value = fmt.Appendf(nil, "%d", n+1)
				if _, err = s.Put(t.Context(), r); err == nil {
					done++
				} else if !errors.Is(err, store.ErrConflict) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	r, err := s.Get(t.Context(), "n")
	if err != nil || string(r.Value) != fmt.Sprint(callers*times) {
		t.Errorf("counter is %s, error %v, want %d", r.Value, err, callers*times)
	}
}

// testOrder: what a caller wrote first is read first, by revision.
func testOrder(t *testing.T, s Store) {
	t.Helper()
	var last uint64
	for i := range 20 {
		r := put(t, s, fmt.Sprintf("k%02d", 20-i), "", 0)
		if r.Rev <= last {
			t.Errorf("revision %d after %d", r.Rev, last)
		}
		last = r.Rev
	}
}

func testContext(t *testing.T, s Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Put(ctx, store.Record{Key: "a"})
	wantErr(t, "put", err, context.Canceled)
	_, err = s.Get(ctx, "a")
	wantErr(t, "get", err, context.Canceled)
	_, err = s.List(ctx, "")
	wantErr(t, "list", err, context.Canceled)
	wantErr(t, "delete", s.Delete(ctx, "a"), context.Canceled)
	wantErr(t, "delete prefix", s.DeletePrefix(ctx, "a"), context.Canceled)
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := s.Put(ctx, store.Record{Key: "a"}); err != nil {
		t.Errorf("put after a cancelled put: %v", err)
	}
}
