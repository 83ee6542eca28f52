package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weftnet/weft/internal/store"
)

var errDisk = errors.New("no space left on device")

// faulty fails the call with number at (from 0), or from there on all of them.
type faulty struct {
	records
	mu   sync.Mutex
	at   int
	mode string
	n    int
	dead bool
}

// call carries a write out, or not, and says so, or not.
func (f *faulty) call(do func() error) error {
	f.mu.Lock()
	n := f.n
	f.n++
	if f.dead {
		f.mu.Unlock()
		return errDisk
	}
	hit := n == f.at
	f.dead = hit && strings.HasPrefix(f.mode, "crash")
	f.mu.Unlock()
	if !hit {
		return do()
	}
	var err error
	if strings.HasSuffix(f.mode, "after") {
		err = do()
	}
	if strings.HasPrefix(f.mode, "uncertain") {
		return fmt.Errorf("%w: %w", store.ErrUncertain, errors.Join(errDisk, err))
	}
	return errors.Join(errDisk, err)
}

func (f *faulty) List(ctx context.Context, prefix string) (out []store.Record, err error) {
	if strings.HasPrefix(f.mode, "uncertain") { // only a write can be
		return f.records.List(ctx, prefix)
	}
	err = f.call(func() error { out, err = f.records.List(ctx, prefix); return err })
	return out, err
}

func (f *faulty) Put(ctx context.Context, r store.Record) (out store.Record, err error) {
	err = f.call(func() error { out, err = f.records.Put(ctx, r); return err })
	return out, err
}

func (f *faulty) Write(ctx context.Context, b store.Batch) (out store.Record, err error) {
	err = f.call(func() error { out, err = f.records.Write(ctx, b); return err })
	return out, err
}

func (f *faulty) Delete(ctx context.Context, key string) error {
	return f.call(func() error { return f.records.Delete(ctx, key) })
}

func (f *faulty) DeletePrefix(ctx context.Context, prefix string) error {
	return f.call(func() error { return f.records.DeletePrefix(ctx, prefix) })
}

// TestFailEveryStepOnce makes each call to the store fail in each way, while
// an engine that behaves as the real one does makes and removes networks.
func TestFailEveryStepOnce(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after", "crash before", "crash after"} {
		t.Run(mode, func(t *testing.T) {
			for at := 0; ; at++ {
				if !failOnce(t, mode, at) {
					if at < 15 {
						t.Errorf("the scenario makes only %d calls", at)
					}
					return
				}
			}
		})
	}
}

// failOnce plays the scenario once and reports whether the failure came.
func failOnce(t *testing.T, mode string, at int) bool {
	t.Helper()
	h := newHouse(t)
	var f *faulty
	h.wrap = func(r records) records {
		f = &faulty{records: r, at: -1, mode: mode}
		return f
	}
	h.restart()
	f.at, f.n = at, 0
	hit := false
	live := map[string]bool{} // "ID address" that were granted
	fatal := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("%s at call %d: %s", mode, at, fmt.Sprintf(format, args...))
	}
	// A request that fails is made again by the user; a release is not.
	ask := func(line string) string {
		got := h.do(line)
		if !strings.HasPrefix(got, "error") {
			return got
		}
		if hit {
			fatal("%s: %s, after the failure", line, got)
		}
		hit = true
		if f.dead {
			h.restart()
		}
		if strings.HasPrefix(line, "free") || strings.HasPrefix(line, "unpool") {
			return got
		}
		if got = h.do(line); strings.HasPrefix(got, "error") {
			// The one thing that a crash leaves: the record of an
			// address whose grant nobody heard of.
			if mode == "crash after" && strings.Contains(got, "in use") {
				return ""
			}
			fatal("%s again: %s", line, got)
		}
		return got
	}
	grant := func(line, id string) string {
		a := ask(strings.ReplaceAll(line, "ID", id))
		if a == "" {
			return a
		}
		if live[id+" "+a] {
			fatal("%s granted twice", a)
		}
		live[id+" "+a] = true
		return a
	}
	free := func(id, a string) {
		if a == "" {
			return
		}
		ask("free " + id + " " + strings.Split(a, "/")[0])
		delete(live, id+" "+a)
	}
	settled := func() {
		if n := h.settle(t.Context()); n != 0 && !f.dead {
			n = h.settle(t.Context()) // the failure hit the settling
			hit = true
			if n != 0 {
				fatal("%d things left to clean up", n)
			}
		}
	}

	one := ask("pool local 10.1.0.0/28 sub 10.1.0.8/29")
	grant("gw ID 10.1.0.1", one)
	a := grant("addr ID", one)
	grant("addr ID 10.1.0.4", one)
	free(one, a)
	settled()
	grant("addr ID", one)
	six := ask("pool local 6")
	grant("gw ID", six)
	grant("addr ID", six)
	four := ask("pool global 4")
	grant("addr ID", four)
	global := ask("pool global 10.1.0.0/28")
	if again := ask("pool global 10.1.0.0/28 sub 10.1.0.8/29"); again == global {
		fatal("sub-pool without effect")
	} else {
		global = again
	}
	grant("gw ID 10.1.0.1", global)
	settled()

	// What was granted is taken: in memory and after a restart.
	if f.dead {
		h.restart()
		hit = true
	}
	reached := hit || f.n > at // also if the one asked did not notice
	f.at = -1
	for range 2 {
		for l := range live {
			id, addr, _ := strings.Cut(l, " ")
			pid, _ := parsePoolID(id)
			p := h.pool(pid.poolKey)
			if p == nil || !p.taken.has(netip.MustParsePrefix(addr).Addr()) {
				fatal("%s was granted and is lost", l)
			}
		}
		before := h.Status(t.Context())
		h.restart()
		if d := cmp.Diff(before, h.Status(t.Context()), cmpopts.IgnoreFields(PoolStatus{}, "Resting", "Names")); d != "" { // of which not all is on disk
			fatal("memory and disk differ (-memory +disk):\n%s", d)
		}
	}
	if strings.HasPrefix(mode, "crash") == false {
		n := uint64(0)
		for _, p := range h.Status(t.Context()).Pools {
			n += p.Used
		}
		if n != uint64(len(live)) {
			fatal("%d addresses taken, %d granted", n, len(live))
		}
	}
	// What was granted can be given back, and then there is nothing.
	for _, p := range h.Status(t.Context()).Pools {
		if got := h.do("unpool " + p.ID); got != "ok" {
			fatal("unpool %s: %s", p.ID, got)
		}
	}
	h.restart()
	left, err := h.left()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 1 || len(left) == 1 && left[0].Key != ulaKey {
		fatal("left on disk: %v", left)
	}
	if err := h.bolt.Close(); err != nil {
		t.Fatal(err)
	}
	return reached
}

// TestFailedReleases makes each step of releasing fail: the engine does not
// ask again, so Run has to.
func TestFailedReleases(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after"} {
		for at := range 5 {
			h := newHouse(t)
			f := &faulty{records: h.store, at: -1, mode: mode}
			h.store = f
			id := h.do("pool local 10.1.0.0/24")
			h.do("addr " + id)
			h.do("addr " + id)
			f.n, f.at = 0, at
			got := []string{h.do("free " + id + " 10.1.0.1"), h.do("free " + id + " 10.1.0.1"), h.do("unpool " + id)}
			if failed := strings.Contains(strings.Join(got, "\n"), "error"); failed != (at < 4) {
				t.Errorf("%s at %d: %q", mode, at, got)
			}
			// While it is being released nobody gets it; the same pool
			// again finishes the release first.
			if 1 <= at && at <= 3 {
				if got := h.do("pool local 10.1.0.0/25"); !strings.Contains(got, "overlaps") {
					t.Errorf("%s at %d: overlapping pool: %s", mode, at, got)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- h.Run(ctx) }()
			for wait := 0; len(h.Status(ctx).Pools) != 0 && wait < 200; wait++ {
				time.Sleep(10 * time.Millisecond)
			}
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			if left, err := h.left(); err != nil || len(left) != 0 || len(h.Status(t.Context()).Pools) != 0 {
				t.Errorf("%s at %d: left %v, %v, error %v", mode, at, left, h.Status(t.Context()), err)
			}
		}
	}
}

// TestTakeOver: an address whose last write had an unknown outcome is given
// to whoever asks for it, and not freed under his feet.
func TestTakeOver(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after"} {
		for _, first := range []string{"addr P 10.1.0.7", "free P 10.1.0.7"} {
			h := newHouse(t)
			f := &faulty{records: h.store, at: -1, mode: mode}
			h.store = f
			id := h.do("pool local 10.1.0.0/24")
			line := func(s string) string { return h.do(strings.ReplaceAll(s, "P", id)) }
			if first[0] == 'f' {
				line("addr P 10.1.0.7")
			}
			f.at, f.n = 0, 0
			if got := line(first); !strings.HasPrefix(got, "error") {
				t.Fatalf("%s: %s: %s", mode, first, got)
			}
			if got := line("addr P 10.1.0.7"); got != "10.1.0.7/24" {
				t.Errorf("%s: %s, then again: %s", mode, first, got)
			}
			if n := h.settle(t.Context()); n != 0 {
				t.Errorf("%d left", n)
			}
			h.restart()
			if got := line("addr P 10.1.0.7"); !strings.Contains(got, "in use") {
				t.Errorf("%s: %s, then granted, then: %s", mode, first, got)
			}
		}
	}
}

// TestTakeOverFails: the doubt stays when the second write fails for certain.
func TestTakeOverFails(t *testing.T) {
	h := newHouse(t)
	f := &faulty{records: h.store, at: -1, mode: "uncertain after"}
	h.store = f
	id := h.do("pool local 10.1.0.0/24")
	f.at, f.n = 0, 0
	h.do("addr " + id + " 10.1.0.1")
	f.at, f.n, f.mode = 0, 0, "fail"
	h.do("addr " + id + " 10.1.0.1")
	if got := h.do("addr " + id); got != "10.1.0.2/24" {
		t.Errorf("10.1.0.1 may be on disk, and the next is %s", got)
	}
	if n := h.settle(t.Context()); n != 0 {
		t.Errorf("%d left", n)
	}
	if got := h.do("addr " + id + " 10.1.0.1"); got != "10.1.0.1/24" {
		t.Errorf("after settling: %s", got)
	}
}

// slow is a disk on which writes hang until they are let go.
type slow struct {
	records
	hang chan struct{}
}

func (s *slow) Put(ctx context.Context, r store.Record) (store.Record, error) {
	out, err := s.records.Put(ctx, r)
	select {
	case <-s.hang:
		return out, err
	case <-ctx.Done():
		return store.Record{}, fmt.Errorf("%w: %w", store.ErrUncertain, ctx.Err())
	}
}

func (s *slow) Write(ctx context.Context, b store.Batch) (store.Record, error) {
	out, err := s.records.Write(ctx, b)
	if b.Put == nil { // as with Delete
		return out, err
	}
	select {
	case <-s.hang:
		return out, err
	case <-ctx.Done():
		return store.Record{}, fmt.Errorf("%w: %w", store.ErrUncertain, ctx.Err())
	}
}

// TestDiskHangs: every call returns when its context ends, requests for other
// pools and Status do not wait for a pool whose write hangs, and nothing that may be
// on disk is handed out.
func TestDiskHangs(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/24")
	pid, err := parsePoolID(id)
	if err != nil {
		t.Fatal(err)
	}
	s := &slow{records: h.store, hang: make(chan struct{})}
	h.store = s
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	start := time.Now()
	for range 10 {
		wg.Go(func() {
			if a, err := h.requestAddress(short, addressRequest{id: pid, kind: kindAuto}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("address %v, error %v", a, err)
			}
		})
		wg.Go(func() {
			_, err := h.requestAddress(short, addressRequest{id: pid, want: netip.MustParseAddr("10.1.0.99"), kind: kindExplicit})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("explicit address: error %v", err)
			}
		})
		wg.Go(func() {
			p := poolRequest{poolID: poolID{poolKey: poolKey{LocalSpace, netip.MustParsePrefix("10.2.0.0/24")}}}
			if _, err := h.requestPool(short, p); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("pool: error %v", err)
			}
		})
	}
	if used := h.Status(t.Context()).Pools[0].Used; used > 11 {
		t.Errorf("%d used", used)
	}
	wg.Wait()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("calls of 100 ms took %v", d)
	}
	close(s.hang)
	if got := h.do("addr " + id); got != "10.1.0.11/24" {
		t.Errorf("ten addresses are in doubt, and the next is %s", got)
	}
	if n := h.settle(t.Context()); n != 0 {
		t.Errorf("%d left", n)
	}
	left, err := h.left()
	if err != nil || len(left) != 2 { // the pool and 10.1.0.11
		t.Errorf("left on disk: %v, %v", left, err)
	}
	if st := h.Status(t.Context()); len(st.Pools) != 1 || st.Pools[0].Used != 1 {
		t.Errorf("status %v", st)
	}
}

// TestConcurrent: many callers on one pool, none gets what another has.
func TestConcurrent(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/22")
	var mu sync.Mutex
	owner := map[string]int{}
	var wg sync.WaitGroup
	for c := range 32 {
		wg.Go(func() {
			for n := range 60 {
				line := "addr " + id
				if n%3 == 0 {
					line = fmt.Sprintf("addr %s 10.1.3.%d", id, 1+n)
				}
				a := h.do(line)
				if strings.HasPrefix(a, "error") {
					if n%3 != 0 {
						t.Errorf("%s: %s", line, a)
					}
					continue
				}
				mu.Lock()
				if o, ok := owner[a]; ok {
					t.Errorf("%s given to %d and %d", a, o, c)
				}
				owner[a] = c
				mu.Unlock()
				if n%2 == 0 {
					mu.Lock()
					delete(owner, a)
					mu.Unlock()
					if got := h.do("free " + id + " " + strings.Split(a, "/")[0]); got != "ok" {
						t.Errorf("free %s: %s", a, got)
					}
				}
			}
		})
	}
	wg.Go(func() {
		for range 50 { // pools come and go beside it
			other := h.do("pool local 4")
			h.do("addr " + other)
			if got := h.do("unpool " + other); got != "ok" {
				t.Error(got)
			}
		}
	})
	wg.Wait()
	before := h.Status(t.Context())
	if len(before.Pools) != 1 || before.Pools[0].Used != uint64(len(owner)) {
		t.Errorf("%d granted, status %v", len(owner), before)
	}
	h.restart()
	if d := cmp.Diff(before, h.Status(t.Context()), cmpopts.IgnoreFields(PoolStatus{}, "Resting"), cmpopts.EquateComparable(netip.Addr{})); d != "" { // which is not on disk
		t.Errorf("memory and disk differ:\n%s", d)
	}
}

// TestTakeOverWhileSettling: Run leaves an address alone that somebody is just
// writing again.
func TestTakeOverWhileSettling(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/24")
	good := h.store
	h.store = &faulty{records: good, at: 0, mode: "uncertain after"}
	h.do("addr " + id + " 10.1.0.7")
	s := &slow{records: good, hang: make(chan struct{})}
	h.store = s
	answer := make(chan string)
	go func() { answer <- h.do("addr " + id + " 10.1.0.7") }()
	pid, _ := parsePoolID(id)
	p, a := h.pool(pid.poolKey), netip.MustParseAddr("10.1.0.7")
	for range 500 {
		p.mu.Lock()
		taken := !p.busy[a].queued
		p.mu.Unlock()
		if taken {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if n := h.settle(t.Context()); n != 0 {
		t.Errorf("%d left", n)
	}
	close(s.hang)
	if got := <-answer; got != "10.1.0.7/24" {
		t.Errorf("taken over: %s", got)
	}
	h.restart()
	if got := h.do("addr " + id + " 10.1.0.7"); !strings.Contains(got, "in use") {
		t.Errorf("after a restart: %s", got)
	}
}

// TestSamePoolAgainAfterFailedRelease: the release is finished first, and Run
// does not take the new pool for the old one.
func TestSamePoolAgainAfterFailedRelease(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after"} {
		for at := range 2 {
			h := newHouse(t)
			f := &faulty{records: h.store, at: -1, mode: mode}
			h.store = f
			id := h.do("pool local 10.1.0.0/24")
			h.do("addr " + id)
			f.n, f.at = 0, at
			if got := h.do("unpool " + id); !strings.HasPrefix(got, "error") {
				t.Fatalf("%s at %d: %s", mode, at, got)
			}
			if got := h.do("pool local 10.1.0.0/24"); got != id {
				t.Errorf("%s at %d: again: %s", mode, at, got)
			}
			if n := h.settle(t.Context()); n != 0 {
				t.Errorf("%d left", n)
			}
			if got := h.do("addr " + id); got != "10.1.0.1/24" {
				t.Errorf("%s at %d: first address: %s", mode, at, got)
			}
			h.restart()
			if st := h.Status(t.Context()); len(st.Pools) != 1 || st.Pools[0].Used != 1 {
				t.Errorf("%s at %d: %v", mode, at, st)
			}
		}
	}
}

// TestReleasePoolWaits for the addresses of the pool that are being written:
// written after the pool's records are gone they would stay for ever.
func TestReleasePoolWaits(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/24")
	s := &slow{records: h.store, hang: make(chan struct{})}
	h.store = s
	pid, _ := parsePoolID(id)
	p := h.pool(pid.poolKey)
	written, released := make(chan string), make(chan string)
	go func() { written <- h.do("addr " + id) }()
	for range 500 {
		p.mu.Lock()
		n := len(p.busy)
		p.mu.Unlock()
		if n > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	go func() { released <- h.do("unpool " + id) }()
	select {
	case got := <-released:
		t.Errorf("released (%s) while an address was being written", got)
	case <-time.After(50 * time.Millisecond):
	}
	close(s.hang)
	if got := <-written; got != "10.1.0.1/24" {
		t.Errorf("address: %s", got)
	}
	if got := <-released; got != "ok" {
		t.Errorf("release: %s", got)
	}
	if left, err := h.left(); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
