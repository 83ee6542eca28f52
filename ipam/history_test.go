package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// past is what is known of an address, or of all, as lines of whom and minutes.
func (h *house) past(q Query) (lines []string) {
	h.tb.Helper()
	list, err := h.History(h.tb.Context(), q)
	if err != nil {
		h.tb.Fatal(err)
	}
	began := time.Unix(1_800_000_000, 0)
	for _, t := range list {
		to := "now"
		if !t.To.IsZero() {
			to = fmt.Sprint(t.To.Sub(began).Minutes())
		}
		lines = append(lines, strings.TrimSpace(fmt.Sprint(t.Address, " ", t.Name, " ", t.Endpoint, " ", t.MAC, " ", t.From.Sub(began).Minutes(), " ", to)))
	}
	return lines
}

func (h *house) wantPast(what string, q Query, want ...string) {
	h.tb.Helper()
	if got := h.past(q); !slices.Equal(got, want) {
		h.tb.Errorf("%s: %q, want %q", what, got, want)
	}
}

// left is what is on disk, but for the history, which outlives what it is about.
func (h *house) left() ([]store.Record, error) {
	h.tb.Helper()
	list, err := h.bolt.List(h.tb.Context(), "")
	return slices.DeleteFunc(list, func(r store.Record) bool { return strings.HasPrefix(r.Key, historyPrefix) }), err
}

func (h *house) after(d time.Duration) { h.clock = h.clock.Add(d) }

// TestHistory answers who had an address when, also over restarts.
func TestHistory(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/24")
	pool, a := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParseAddr("10.1.0.1")
	end1, end2 := strings.Repeat("1", 64), strings.Repeat("2", 64)
	h.addressFor(id, "/web", "")
	h.Assigned(pool, a, end1, MAC{2, 0, 0, 0, 0, 1})
	h.Assigned(pool, netip.MustParseAddr("10.1.0.77"), end1, MAC{}) // nobody has it
	h.after(5 * time.Minute)
	if err := h.history.flush(t.Context(), h.store); err != nil {
		t.Fatal(err)
	}
	h.restart()
	web := "10.1.0.1 web " + end1 + " 02:00:00:00:00:01 0 "
	h.wantPast("after a restart", Query{}, web+"now")
	h.do("free " + id + " 10.1.0.1")
	h.after(time.Minute)
	h.addressFor(id, "stack_db.1.abcdefghijklmnopqrstuvwxy", "10.1.0.1")
	h.Assigned(pool, a, end2, MAC{})
	h.after(time.Minute)
	h.addressFor(id, "mail", "")
	db := "10.1.0.1 stack_db.1.abcdefghijklmnopqrstuvwxy " + end2 + "  6 now"
	h.wantPast("one after the other", Query{Address: a}, web+"5", db)
	for minute, want := range map[int][]string{-1: nil, 0: {web + "5"}, 4: {web + "5"}, 5: nil, 6: {db}} {
		at := time.Unix(1_800_000_000, 0).Add(time.Duration(minute) * time.Minute)
		h.wantPast(fmt.Sprint("minute ", minute), Query{Address: a, Since: at, Until: at}, want...)
	}
	h.wantPast("by name", Query{Who: "web"}, web+"5")
	h.wantPast("by endpoint", Query{Who: end2[:12]}, db)
	h.wantPast("by a short beginning", Query{Who: "1"})
	h.wantPast("by MAC address", Query{Who: "02:00:00:00:00:01"}, web+"5")
	h.wantPast("no prefix of another", Query{Address: netip.MustParseAddr("10.1.0.10")})

	// A network that goes takes its addresses with it, whoever released them.
	h.do("unpool " + id)
	h.after(time.Minute)
	h.restart()
	if err := h.sweepHistory(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.wantPast("no network", Query{Address: netip.MustParseAddr("10.1.0.2")}, "10.1.0.2 mail   7 8")
	h.after(month + time.Second)
	if err := h.sweepHistory(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.wantPast("too old", Query{})
	if left, err := h.bolt.List(t.Context(), historyPrefix); err != nil || len(left) > 0 {
		t.Errorf("left %v %v", left, err)
	}
}

// TestHistoryOfBefore: what a version without history handed out is known from its
// records, and none is kept where none is wanted.
func TestHistoryOfBefore(t *testing.T) {
	h := newClock(t)
	h.keep = -1
	h.restart()
	id := h.do("pool local 10.1.0.0/24")
	h.addressFor(id, "web", "")
	if left, err := h.bolt.List(t.Context(), historyPrefix); err != nil || len(left) > 0 {
		t.Errorf("kept %v %v", left, err)
	}
	if _, err := h.History(t.Context(), Query{}); err == nil || !strings.Contains(err.Error(), "HISTORY=720h") {
		t.Error(err)
	}
	h.keep = 0
	h.restart()
	if list, err := h.History(t.Context(), Query{}); err != nil || len(list) != 1 || list[0].Name != "web" || !list[0].To.IsZero() || time.Since(list[0].From) > time.Minute {
		t.Errorf("%+v %v", list, err)
	}
	h.history.keep = 0
	if err := h.sweepHistory(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := h.bolt.List(t.Context(), historyPrefix); err != nil || len(left) > 0 {
		t.Errorf("kept %v %v", left, err)
	}
}

// TestHistoryIsBounded: whatever comes and goes, so much is kept, and what goes on is.
func TestHistoryIsBounded(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/24")
	h.addressFor(id, "web", "")
	var b store.Batch
	for n := range mostHistory + 700 {
		at := h.clock.Add(time.Duration(n-mostHistory-700) * time.Second).UTC()
		old := Tenure{Version: recordVersion, Address: netip.MustParseAddr("10.1.0.9"), Pool: netip.MustParsePrefix("10.1.0.0/24"), Space: LocalSpace, From: at, To: at.Add(time.Second)}
		b.Set = append(b.Set, old.record())
	}
	b.Set = append(b.Set, store.Record{Key: historyPrefix + "10.1.0.9/nonsense", Value: []byte("{")})
	if _, err := h.bolt.Write(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	h.restart()
	if err := h.sweepHistory(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := h.History(t.Context(), Query{})
	if err != nil || len(list) != mostHistory || list[len(list)-1].Name != "web" || h.history.count != mostHistory {
		t.Errorf("%d are kept, %d counted, %v", len(list), h.history.count, err)
	}
	if first := list[0].From; !first.Equal(h.clock.Add(-(mostHistory - 1) * time.Second)) {
		t.Errorf("the first one is of %v", first)
	}
}

// TestHistoryCostsNoWrite: a beginning and an end are in the transaction of the
// address itself.
func TestHistoryCostsNoWrite(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/24")
	f := &faulty{records: h.store, at: -1}
	h.store = f
	for _, line := range []string{"addr " + id, "free " + id + " 10.1.0.1"} {
		f.n = 0
		h.do(line)
		if f.n != 1 {
			t.Errorf("%s: %d calls to the store, want 1", line, f.n)
		}
	}
}

// TestHistoryAfterFaults: whatever fails and whenever the process dies, who has an
// address now is what the history says, and nothing that was not granted.
func TestHistoryAfterFaults(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after", "crash before", "crash after"} {
		for at := range 6 {
			h := newHouse(t)
			id := h.do("pool local 10.1.0.0/24")
			var f *faulty
			h.wrap = func(r records) records {
				f = &faulty{records: r, at: -1, mode: mode}
				return f
			}
			h.restart()
			f.n, f.at = 0, at
			granted := 0
			for range 2 {
				for _, line := range []string{"addr " + id + " 10.1.0.1", "addr " + id, "free " + id + " 10.1.0.1", "addr " + id + " 10.1.0.1"} {
					got := h.do(line)
					if f.dead {
						h.restart()
					}
					h.settle(t.Context())
					if strings.HasPrefix(got, "10.1.") {
						granted++
					}
				}
			}
			f.at = -1
			if err := h.sweepHistory(t.Context()); err != nil {
				t.Fatal(err)
			}
			var now []string
			list, err := h.History(t.Context(), Query{})
			for _, e := range list {
				if e.To.IsZero() {
					now = append(now, e.Address.String())
				}
			}
			slices.Sort(now)
			p := h.pool(poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/24")})
			var taken []string
			for a := netip.MustParseAddr("10.1.0.1"); len(taken) < int(p.taken.len()); a = a.Next() {
				if p.taken.has(a) {
					taken = append(taken, a.String())
				}
			}
			slices.Sort(taken)
			if err != nil || !slices.Equal(now, taken) {
				t.Errorf("%s at %d: %q have one, %q in the history: %+v %v", mode, at, taken, now, list, err)
			}
			if len(list) > granted+1 { // a crash after a write is one that nobody was told of
				t.Errorf("%s at %d: %d granted, and the history has %+v", mode, at, granted, list)
			}
		}
	}
}
