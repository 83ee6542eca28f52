package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/weftnet/weft/internal/store"
)

// TestTwoRanges has two networks of one LAN share the subnet: no address is handed
// out twice, whichever asks for it, but the gateway, and each may go first.
func TestTwoRanges(t *testing.T) {
	const (
		a = "weft-local,10.1.0.0/24,10.1.0.64/26"
		b = "weft-local,10.1.0.0/24,10.1.0.128/25"
	)
	script := func(t *testing.T, h *house, lines string) {
		t.Helper()
		for line := range strings.SplitSeq(strings.TrimSpace(lines), "\n") {
			call, want, _ := strings.Cut(strings.TrimSpace(line), " -> ")
			r := strings.NewReplacer("@A", a, "@B", b)
			switch f := strings.Fields(call); f[0] {
			case "restart":
				h.restart()
				continue
			case "host":
				h.host = []netip.Prefix{netip.MustParsePrefix(f[1])}
				continue
			case "hold":
				h.hold("10.1.0.0/24", localID)
				h.networks = len(f) - 1
				continue
			}
			if got := h.do(r.Replace(call)); !matches(got, r.Replace(want)) {
				t.Errorf("%s\n got %s\nwant %s", call, got, r.Replace(want))
			}
		}
	}
	const both = `
		pool local 10.1.0.0/24 sub 10.1.0.64/26 -> @A
		gw @A 10.1.0.1 -> 10.1.0.1/24
		hold A
		pool local 10.1.0.0/24 sub 10.1.0.128/25 -> @B
		gw @B 10.1.0.1 -> 10.1.0.1/24
		hold A B
`
	for name, lines := range map[string]string{
		"each chooses of its own": `
			addr @A -> 10.1.0.64/24
			addr @B -> 10.1.0.128/24
			addr @A -> 10.1.0.65/24
			free @B 10.1.0.128 -> ok
			addr @A -> 10.1.0.66/24
			addr @B -> 10.1.0.128/24`,
		"by number, also in the other's": `
			addr @A 10.1.0.128 -> 10.1.0.128/24
			addr @B -> 10.1.0.129/24
			addr @B 10.1.0.128 -> error: address 10.1.0.128 of pool 10.1.0.0/24 is in use…
			addr @A 10.1.0.129 -> error: …is in use…
			addr @A 10.1.0.9 -> 10.1.0.9/24
			addr @B 10.1.0.9 -> error: …is in use…
			restart
			addr @B 10.1.0.128 -> error: …is in use…
			addr @A 10.1.0.1 -> error: …is in use by the gateway…
			addr @B 10.1.0.1 -> error: …is in use by the gateway…`,
		"the gateway stays the other's": `
			gw @B -> 10.1.0.1/24
			free @B 10.1.0.1 -> ok
			unpool @B -> ok
			addr @A 10.1.0.1 -> error: …is in use by the gateway…
			free @A 10.1.0.1 -> ok
			addr @A 10.1.0.1 -> 10.1.0.1/24`,
		"another gateway": `
			gw @B 10.1.0.254 -> 10.1.0.254/24
			addr @A 10.1.0.254 -> error: …in use by the gateway…
			addr @A 10.1.0.7 -> 10.1.0.7/24
			gw @B 10.1.0.7 -> error: …is in use…`,
		"another gateway goes with its network": `
			unpool @B -> ok
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> @B
			gw @B 10.1.0.254 -> 10.1.0.254/24
			hold A B
			pool local 10.1.0.0/24 sub 10.1.0.0/27 -> weft-local,10.1.0.0/24,10.1.0.0/27
			gw weft-local,10.1.0.0/24,10.1.0.0/27 -> 10.1.0.1/24
			gw @B -> 10.1.0.254/24
			gw @A -> 10.1.0.1/24
			restart
			gw @A -> 10.1.0.1/24
			gw @B -> 10.1.0.254/24
			free @B 10.1.0.254 -> ok
			unpool @B -> ok
			addr @A 10.1.0.254 -> 10.1.0.254/24
			restart
			addr @A 10.1.0.254 -> error: address 10.1.0.254 of pool 10.1.0.0/24 is in use: …`,
		"another gateway stays while a network has it": `
			gw @B 10.1.0.254 -> 10.1.0.254/24
			pool local 10.1.0.0/24 sub 10.1.0.0/27 -> weft-local,10.1.0.0/24,10.1.0.0/27
			gw weft-local,10.1.0.0/24,10.1.0.0/27 10.1.0.254 -> 10.1.0.254/24
			restart
			unpool @B -> ok
			addr @A 10.1.0.254 -> error: …is in use by the gateway…
			unpool weft-local,10.1.0.0/24,10.1.0.0/27 -> ok
			addr @A 10.1.0.254 -> 10.1.0.254/24
			addr @A 10.1.0.1 -> error: …is in use by the gateway…`,
		"the first's gateway goes with it": `
			unpool @B -> ok
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> @B
			gw @B 10.1.0.254 -> 10.1.0.254/24
			hold A B
			unpool @A -> ok
			addr @B 10.1.0.1 -> 10.1.0.1/24
			hold B
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> @A
			gw @A -> 10.1.0.254/24`,
		"a gateway of a network that was never made": `
			gw @B 10.1.0.254 -> 10.1.0.254/24
			hold A
			restart
			pool local 10.1.0.0/24 sub 10.1.0.128/25 reserve.web=10.1.0.254 -> @B
			gw @B -> 10.1.0.1/24
			addr @B 10.1.0.254 for web -> 10.1.0.254/24`,
		"the first goes first": `
			addr @A -> 10.1.0.64/24
			addr @B 10.1.0.65 -> 10.1.0.65/24
			free @A 10.1.0.64 -> ok
			free @A 10.1.0.1 -> ok
			unpool @A -> ok
			hold B
			restart
			addr @B 10.1.0.65 -> error: …is in use…
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> @A
			gw @A -> 10.1.0.1/24
			addr @A -> 10.1.0.64/24
			addr @A -> 10.1.0.66/24`,
		"overlaps are refused": `
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: ip-range 10.1.0.64/26 of subnet 10.1.0.0/24 overlaps 10.1.0.64/26, which is in use: choose another --ip-range, such as 10.1.0.0/26
			pool local 10.1.0.0/24 sub 10.1.0.192/26 -> error: ip-range 10.1.0.192/26 of subnet 10.1.0.0/24 overlaps 10.1.0.128/25, which is in use: choose another --ip-range, one beside it
			pool local 10.1.0.0/24 -> error: subnet 10.1.0.0/24 is in use, with --ip-range 10.1.0.64/26: choose another subnet, or, to share it on the same parent, add an --ip-range, such as 10.1.0.0/26
			pool local 10.1.0.0/25 sub 10.1.0.0/26 -> error: subnet 10.1.0.0/25 overlaps 10.1.0.0/24…
			restart
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: …overlaps…
			pool local 10.1.0.0/24 sub 10.1.0.0/27 quarantine=60s -> weft-local,10.1.0.0/24,10.1.0.0/27
			pool local 10.1.0.0/24 sub 10.1.0.32/28 quarantine=61s -> error: subnet 10.1.0.0/24 is shared with a network that has quarantine=60s, and here it is to have quarantine=61s: give the same --ipam-opt, or none
			pool local 10.1.0.0/24 sub 10.1.0.32/28 -> weft-local,10.1.0.0/24,10.1.0.32/28
			addr @A -> 10.1.0.64/24
			free @A 10.1.0.64 -> ok
			addr @A -> 10.1.0.65/24`,
		"what is suggested is free of the gateway": `
			unpool @B -> ok
			pool local 10.1.0.0/24 -> error: …add an --ip-range, such as 10.1.0.128/25
			free @A 10.1.0.1 -> ok
			gw @A 10.1.0.200 -> 10.1.0.200/24
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: …choose another --ip-range, such as 10.1.0.0/26
			host 10.1.0.5/24
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: …choose another --ip-range, such as 10.1.0.0/26
			free @A 10.1.0.200 -> ok
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: …choose another --ip-range, such as 10.1.0.128/25`,
		"its network was never made": `
			hold A
			restart
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> @B
			gw @B 10.1.0.1 -> 10.1.0.1/24
			hold A B
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> error: …overlaps…`,
		"the other's was used": `
			hold A
			restart
			addr @A -> 10.1.0.64/24
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: …overlaps…
			pool local 10.1.0.0/24 sub 10.1.0.192/26 -> weft-local,10.1.0.0/24,10.1.0.192/26`,
		"a name is kept by one": `
			addr @A for web -> 10.1.0.64/24
			addr @B for web -> 10.1.0.128/24
			free @A 10.1.0.64 -> ok
			free @B 10.1.0.128 -> ok
			addr @B for web -> 10.1.0.128/24
			addr @A for web -> 10.1.0.64/24`,
		"a name goes with the range": `
			addr @B for web -> 10.1.0.128/24
			addr @B 10.1.0.200 -> 10.1.0.200/24
			free @B 10.1.0.128 -> ok
			free @B 10.1.0.200 -> ok
			unpool @B -> ok
			addr @A for web -> 10.1.0.64/24
			free @A 10.1.0.64 -> ok
			restart
			addr @A for web -> 10.1.0.64/24`,
		"options go with who gave them": `
			unpool @B -> ok
			pool local 10.1.0.0/24 sub 10.1.0.128/25 keep=0 reserve.web=10.1.0.200 -> @B
			pool local 10.1.0.0/24 sub 10.1.0.0/27 -> weft-local,10.1.0.0/24,10.1.0.0/27
			restart
			unpool weft-local,10.1.0.0/24,10.1.0.0/27 -> ok
			addr @B for web -> 10.1.0.200/24
			free @B 10.1.0.200 -> ok
			unpool @B -> ok
			restart
			addr @A for web -> 10.1.0.64/24
			pool local 10.1.0.0/24 sub 10.1.0.128/25 keep=1h -> @B
			pool local 10.1.0.0/24 sub 10.1.0.0/27 keep=1h -> weft-local,10.1.0.0/24,10.1.0.0/27
			unpool @B -> ok
			pool local 10.1.0.0/24 sub 10.1.0.128/25 keep=2h -> error: …is shared with a network that has keep=1h…`,
		"a gateway is not reserved": `
			pool local 10.1.0.0/24 sub 10.1.0.0/27 reserve.web=10.1.0.1 -> error: ipam option reserve.web=10.1.0.1: it is the gateway of a network that shares subnet 10.1.0.0/24: choose another
			pool local 10.1.0.0/24 sub 10.1.0.0/27 reserve.web=10.1.0.2 -> weft-local,10.1.0.0/24,10.1.0.0/27`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			script(t, h, both)
			script(t, h, lines)
		})
	}
	// The records are lost, and each network goes on with the ID that it has.
	t.Run("taken up again", func(t *testing.T) {
		h := newHouse(t)
		script(t, h, `
			addr @A -> 10.1.0.64/24
			addr @B -> 10.1.0.128/24
			unpool @A -> ok
			addr @B 10.1.0.128 -> error: …is in use…
			unpool @B -> ok`)
		if left, err := h.left(); err != nil || len(left) != 0 {
			t.Errorf("left %v, %v", left, err)
		}
	})
	t.Run("without a range", func(t *testing.T) {
		h := newHouse(t)
		script(t, h, `
			pool local 10.1.0.0/24 -> weft-local,10.1.0.0/24
			pool local 10.1.0.0/24 sub 10.1.0.64/26 -> error: subnet 10.1.0.0/24 is in use, without an --ip-range: …`)
	})
}

// TestTypedForTheSecond: the first network took a gateway that nobody typed, and for
// the second one somebody types it. The driver does not replace it.
func TestTypedForTheSecond(t *testing.T) {
	h := newHouse(t)
	a := h.do("pool local 10.1.0.0/24 sub 10.1.0.0/26")
	if got := h.do("gw " + a); got != "10.1.0.1/24" {
		t.Fatal(got)
	}
	pool, gateway := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParseAddr("10.1.0.1")
	if _, guessed, _ := h.Chosen(pool, gateway); !guessed {
		t.Error("the first one's was typed")
	}
	if got := h.do("gw " + h.do("pool local 10.1.0.0/24 sub 10.1.0.64/26") + " 10.1.0.1"); got != "10.1.0.1/24" {
		t.Fatal(got)
	}
	if _, guessed, ours := h.Chosen(pool, gateway); guessed || !ours {
		t.Errorf("the second one's was guessed: %v, %v", guessed, ours)
	}
}

// TestRangesOnDisk: what was written before networks could share a pool is read as
// it was, one range more changes nothing in the key, and a range that cannot be is
// not read.
func TestRangesOnDisk(t *testing.T) {
	h := newHouse(t)
	put := func(value string) error {
		key := poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/24")}.record()
		rev, err := h.revision(t.Context(), key)
		if err != nil {
			return err
		}
		_, err = h.bolt.Put(t.Context(), store.Record{Key: key, Value: []byte(value), Rev: rev})
		return err
	}
	if err := put(`{"Version":1,"SubPool":"10.1.0.64/26","Created":"2026-01-01T00:00:00Z"}`); err != nil {
		t.Fatal(err)
	}
	h.restart()
	h.hold("10.1.0.0/24", localID)
	if got := h.do("addr weft-local,10.1.0.0/24,10.1.0.64/26"); got != "10.1.0.64/24" {
		t.Errorf("of the old record: %s", got)
	}
	if got := h.do("pool local 10.1.0.0/24 sub 10.1.0.128/25"); got != "weft-local,10.1.0.0/24,10.1.0.128/25" {
		t.Errorf("one more: %s", got)
	}
	list, err := h.bolt.List(t.Context(), poolPrefix)
	if err != nil || len(list) != 1 {
		t.Fatalf("%d records, %v", len(list), err)
	}
	var rec poolRecord
	if err := json.Unmarshal(list[0].Value, &rec); err != nil || rec.SubPool.String() != "10.1.0.64/26" || fmt.Sprint(rec.More) != "[10.1.0.128/25]" {
		t.Errorf("record %s, %v", list[0].Value, err)
	}
	if st := h.Status(t.Context()).Pools; len(st) != 1 || st[0].SubPool != "10.1.0.64/26" || !slices.Equal(st[0].MoreSubPools, []string{"10.1.0.128/25"}) {
		t.Errorf("status %+v", st)
	}
	for _, more := range []string{`"10.1.0.0/25"`, `"10.2.0.0/26"`, `""`} {
		if err := put(`{"Version":1,"SubPool":"10.1.0.64/26","More":[` + more + `]}`); err != nil {
			t.Fatal(err)
		}
		if i, err := New(Config{Store: h.bolt, Host: h.IPAM.host, Log: h.IPAM.log}); err != nil || i.Load(t.Context()) == nil {
			t.Errorf("a range %s more is read, %v", more, err)
		}
	}
}

// TestFailedRanges makes each step of a second range's coming and going fail: the
// first network keeps all that it has, Run finishes what was released, a gateway that
// only the second one asked for goes with it, and another try succeeds.
func TestFailedRanges(t *testing.T) {
	for _, mode := range []string{"fail", "uncertain before", "uncertain after", "crash before", "crash after"} {
		for n := range 13 {
			at, gateway, calls := n, "10.1.0.1", 5
			if n > calls {
				at, gateway, calls = n-6, "10.1.0.254", 6
			}
			h := newHouse(t)
			a := h.do("pool local 10.1.0.0/24 sub 10.1.0.64/26")
			h.do("gw " + a + " 10.1.0.1")
			h.do("addr " + a)
			h.hold("10.1.0.0/24", localID)
			f := &faulty{records: h.store, at: at, mode: mode}
			h.store = f
			b := h.do("pool local 10.1.0.0/24 sub 10.1.0.128/25")
			if !strings.HasPrefix(b, "error") {
				h.do("gw " + b + " " + gateway)
				h.do("addr " + b)
				h.do("free " + b + " 10.1.0.128")
				h.do("free " + b + " " + gateway)
				h.do("unpool " + b)
			}
			f.at = -1
			if hit := f.n > at; hit != (at < calls) {
				t.Errorf("%s at %d of %d: %d calls", mode, at, calls, f.n)
			}
			if strings.HasPrefix(mode, "crash") {
				h.restart()
			}
			for range 3 {
				h.settle(t.Context())
			}
			if got := h.do("addr " + a); got != "10.1.0.65/24" {
				t.Errorf("%s at %d: the first network gets %s", mode, at, got)
			}
			if got := h.do("addr " + a + " 10.1.0.1"); !strings.Contains(got, "is in use by the gateway") {
				t.Errorf("%s at %d: its gateway: %s", mode, at, got)
			}
			const id = "weft-local,10.1.0.0/24,10.1.0.128/25"
			if got := h.do("pool local 10.1.0.0/24 sub 10.1.0.128/25"); got != id {
				t.Errorf("%s at %d: again: %s", mode, at, got)
			}
			h.networks = 2
			if got := h.do("gw " + id + " 10.1.0.1"); got != "10.1.0.1/24" {
				t.Errorf("%s at %d: gateway again: %s", mode, at, got)
			}
			if got := h.do("addr " + a + " 10.1.0.254"); got != "10.1.0.254/24" {
				t.Errorf("%s at %d: %s was left: %s", mode, at, gateway, got)
			}
			h.do("unpool " + id)
			h.do("unpool " + a)
			if left, err := h.left(); err != nil || len(left) != 0 {
				t.Errorf("%s at %d: left %v, %v", mode, at, left, err)
			}
		}
	}
}

// TestRangesAtOnce: while one network chooses, another asks by number in its range, and
// a third one comes and goes, nobody gets what another has.
func TestRangesAtOnce(t *testing.T) {
	h := newHouse(t)
	a := h.do("pool local 10.1.0.0/24 sub 10.1.0.64/26")
	b := h.do("pool local 10.1.0.0/24 sub 10.1.0.128/25")
	h.do("gw " + a + " 10.1.0.1")
	h.do("gw " + b + " 10.1.0.1")
	var mu sync.Mutex
	owner := map[string]string{"10.1.0.1/24": "gateway"}
	ask := func(id, who, addr string) {
		got := h.do(strings.TrimSpace("addr " + id + " " + addr))
		if strings.HasPrefix(got, "error") {
			if addr == "" {
				t.Errorf("%s: %s", who, got)
			}
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if o := owner[got]; o != "" {
			t.Errorf("%s has %s, and so has %s", who, got, o)
		}
		owner[got] = who
	}
	var wg sync.WaitGroup
	for n := range 30 {
		wg.Go(func() { ask(b, fmt.Sprint("b", n), "") })
		wg.Go(func() { ask(a, fmt.Sprint("a", n), fmt.Sprintf("10.1.0.%d", 128+n)) })
		wg.Go(func() { ask(b, fmt.Sprint("B", n), fmt.Sprintf("10.1.0.%d", 32+n%16)) })
	}
	wg.Go(func() {
		for range 10 {
			c := h.do("pool local 10.1.0.0/24 sub 10.1.0.32/27")
			h.do("gw " + c + " 10.1.0.1")
			ask(c, "c", "")
			h.do("free " + c + " 10.1.0.1")
			if got := h.do("unpool " + c); got != "ok" {
				t.Error(got)
			}
		}
	})
	wg.Wait()
	for addr, who := range owner {
		id := map[byte]string{'a': a, 'b': b}[who[0]]
		if id == "" {
			id = b
		}
		if got := h.do("addr " + id + " " + strings.TrimSuffix(addr, "/24")); !strings.Contains(got, "is in use") {
			t.Errorf("%s is %s's: %s", addr, who, got)
		}
	}
	h.do("unpool " + a)
	h.do("unpool " + b)
	if left, err := h.left(); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
