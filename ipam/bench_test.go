package ipam

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/etcdtest"
)

// durable gives the house a store that syncs.
func durable(b *testing.B) *house {
	b.Helper()
	h := newHouse(b)
	s, err := store.Open(filepath.Join(b.TempDir(), "synced.db"), store.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	h.store = s
	return h
}

func benchPool(b *testing.B, h *house, id string) addressRequest {
	b.Helper()
	p, err := parsePoolID(id)
	if err == nil {
		_, err = h.requestPool(b.Context(), poolRequest{poolID: p, opts: plain})
	}
	if err != nil {
		b.Fatal(err)
	}
	return addressRequest{id: p, kind: kindAuto}
}

// BenchmarkRequestAddress takes turns with one synced write of the same size
// to a store of its own, which is what it cannot do without.
func BenchmarkRequestAddress(b *testing.B) {
	h := durable(b)
	r := benchPool(b, h, "weft-local,10.0.0.0/8")
	alone, err := store.Open(filepath.Join(b.TempDir(), "alone.db"), store.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = alone.Close() })
	value := make([]byte, 80)
	var ours, theirs time.Duration
	for i := 0; b.Loop(); i++ {
		t0 := time.Now()
		if _, err := alone.Put(b.Context(), store.Record{Key: fmt.Sprintf("ipam/addr/weft-local,10.0.0.0/8/%09d", i), Value: value}); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if _, err := h.requestAddress(b.Context(), r); err != nil {
			b.Fatal(err)
		}
		theirs += t1.Sub(t0)
		ours += time.Since(t1)
	}
	b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "us/request")
	b.ReportMetric(float64(theirs.Microseconds())/float64(b.N), "us/write")
	b.ReportMetric(float64(ours)/float64(theirs), "x-write")
}

// BenchmarkBoundName has containers of a name come back to their address, and
// containers without a name get one, in turn.
func BenchmarkBoundName(b *testing.B) {
	benchBound(b, durable(b), "weft-local")
}

// BenchmarkSharedBoundName does so in a space that hosts share.
func BenchmarkSharedBoundName(b *testing.B) {
	c := etcdtest.Start(b, etcdtest.Config{})
	benchBound(b, newHost(b, "alpha", openEtcd(b, c.Endpoints, "")), "space=blue")
}

func benchBound(b *testing.B, h *house, space string) {
	b.Helper()
	requests := [2]addressRequest{benchPool(b, h, space+",11.0.0.0/16"), benchPool(b, h, space+",10.0.0.0/16")}
	const names = 64
	name := func(i int) string { return fmt.Sprintf("web-%d", i%names) }
	has := map[string]netip.Prefix{}
	for i := range names { // each has one to come back to
		r := requests[0]
		r.name = name(i)
		a, err := h.requestAddress(b.Context(), r)
		if err == nil {
			err = h.releaseAddress(b.Context(), r.id, a.Addr())
		}
		if err != nil {
			b.Fatal(err)
		}
		has[r.name] = a
	}
	var request, release [2][]time.Duration
	for i := 0; b.Loop(); i++ {
		for n := range 2 {
			k := (i + n) % 2 // in turn, who comes first
			r := requests[k]
			if k == 0 {
				r.name = name(i)
			}
			t0 := time.Now()
			a, err := h.requestAddress(b.Context(), r)
			t1 := time.Now()
			if err == nil {
				err = h.releaseAddress(b.Context(), r.id, a.Addr())
			}
			if err != nil {
				b.Fatal(err)
			}
			if k == 0 && a != has[r.name] {
				b.Fatalf("%s has %s, had %s", r.name, a, has[r.name])
			}
			request[k] = append(request[k], t1.Sub(t0))
			release[k] = append(release[k], time.Since(t1))
		}
	}
	// Medians: a disk that stands still once would be all of a mean.
	middle := func(d []time.Duration) float64 {
		slices.Sort(d)
		return float64(d[len(d)/2].Nanoseconds()) / 1000
	}
	b.ReportMetric(middle(request[0]), "us/request")
	b.ReportMetric(middle(request[0])/middle(request[1]), "x-unnamed")
	b.ReportMetric(middle(release[0])/middle(release[1]), "x-unnamed-release")
}

// BenchmarkSharedRequestAddress takes turns with one write to the same etcd.
func BenchmarkSharedRequestAddress(b *testing.B) {
	c := etcdtest.Start(b, etcdtest.Config{})
	h := newHost(b, "alpha", openEtcd(b, c.Endpoints, ""))
	r := benchPool(b, h, "space=blue,10.0.0.0/8")
	value := make([]byte, 160)
	var ours, theirs time.Duration
	for i := 0; b.Loop(); i++ {
		t0 := time.Now()
		if _, err := h.shared.Put(b.Context(), store.Record{Key: fmt.Sprintf("alone/%09d", i), Value: value}); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if _, err := h.requestAddress(b.Context(), r); err != nil {
			b.Fatal(err)
		}
		theirs += t1.Sub(t0)
		ours += time.Since(t1)
	}
	b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "us/request")
	b.ReportMetric(float64(theirs.Microseconds())/float64(b.N), "us/write")
	b.ReportMetric(float64(ours)/float64(theirs), "x-write")
}

// BenchmarkRequestAddressParallel64 reports the throughput of 64 callers on one
// pool as a multiple of that of one, both in this run.
func BenchmarkRequestAddressParallel64(b *testing.B) {
	h := durable(b)
	r := benchPool(b, h, "weft-local,10.0.0.0/8")
	const alone = 300
	t0 := time.Now()
	for range alone {
		if _, err := h.requestAddress(b.Context(), r); err != nil {
			b.Fatal(err)
		}
	}
	one := time.Since(t0) / alone
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	b.SetParallelism(32) // times GOMAXPROCS
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := h.requestAddress(b.Context(), r); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(one)/(float64(b.Elapsed())/float64(b.N)), "x-one")
}

// BenchmarkMillionTaken asks a /8 with a million addresses taken and an empty
// one in turn, at the worst place: the search starts where all are taken. The
// file is not synced, which would hide the difference.
func BenchmarkMillionTaken(b *testing.B) {
	h := newHouse(b)
	full, empty := benchPool(b, h, "weft-local,10.0.0.0/8"), benchPool(b, h, "weft-local,11.0.0.0/8")
	p := h.pool(full.id.poolKey)
	for i := range uint32(1_000_000) {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 10<<24+1+i)
		p.taken.add(netip.AddrFrom4(a))
	}
	var times [2]time.Duration
	for i := 0; b.Loop(); i++ {
		for n := range 2 {
			k := (i + n) % 2 // in turn, who comes first
			r := []addressRequest{full, empty}[k]
			p := h.pool(r.id.poolKey)
			p.mu.Lock()
			p.cursor = netip.Addr{}
			p.mu.Unlock()
			t0 := time.Now()
			a, err := h.requestAddress(b.Context(), r)
			times[k] += time.Since(t0)
			if err != nil {
				b.Fatal(err)
			}
			if err := h.releaseAddress(b.Context(), r.id, a.Addr()); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(times[0].Nanoseconds())/float64(b.N), "ns/full")
	b.ReportMetric(float64(times[1].Nanoseconds())/float64(b.N), "ns/empty")
	b.ReportMetric(float64(times[0])/float64(times[1]), "x-empty")
}

// BenchmarkNext is the choice alone.
func BenchmarkNext(b *testing.B) {
	var s addrSet
	for i := range uint32(1_000_000) {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 10<<24+i)
		s.add(netip.AddrFrom4(a))
	}
	first, last := netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr("10.255.255.255")
	for b.Loop() {
		if _, ok := s.next(first, last); !ok {
			b.Fatal("full")
		}
	}
}
