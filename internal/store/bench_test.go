package store

import (
	"fmt"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

var benchValue = make([]byte, 100)

// bare is what one write costs without us: bbolt, one record, synced.
func bare(b *testing.B) func(i int) {
	b.Helper()
	db, err := bbolt.Open(filepath.Join(b.TempDir(), "bare.db"), 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = db.Close() })
	return func(i int) {
		err := db.Update(func(tx *bbolt.Tx) error {
			k, err := tx.CreateBucketIfNotExists([]byte("b"))
			if err != nil {
				return err
			}
			return k.Put(fmt.Appendf(nil, "key/%09d", i), benchValue)
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBare(b *testing.B) {
	f := bare(b)
	for i := 0; b.Loop(); i++ {
		f(i)
	}
}

// BenchmarkPut takes turns with a bare bbolt write: the disk's speed changes
// from second to second, the ratio does not.
func BenchmarkPut(b *testing.B) {
	s, f := open(b, filepath.Join(b.TempDir(), "s.db")), bare(b)
	var ours, theirs time.Duration
	for i := 0; b.Loop(); i++ {
		t0 := time.Now()
		f(i)
		t1 := time.Now()
		if _, err := s.Put(b.Context(), Record{Key: fmt.Sprintf("key/%09d", i), Value: benchValue}); err != nil {
			b.Fatal(err)
		}
		theirs += t1.Sub(t0)
		ours += time.Since(t1)
	}
	b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "us/put")
	b.ReportMetric(float64(theirs.Microseconds())/float64(b.N), "us/bare")
	b.ReportMetric(float64(ours)/float64(theirs), "x-bare")
}

// BenchmarkPutParallel64 reports the throughput of 64 callers as a multiple of
// that of one, both in this run.
func BenchmarkPutParallel64(b *testing.B) {
	s := open(b, filepath.Join(b.TempDir(), "s.db"))
	const alone = 200
	t0 := time.Now()
	for i := range alone {
		if _, err := s.Put(b.Context(), Record{Key: fmt.Sprintf("one/%09d", i), Value: benchValue}); err != nil {
			b.Fatal(err)
		}
	}
	one := time.Since(t0) / alone
	var n, commits atomic.Int64
	real := s.commit
	s.commit = func(f func(*bbolt.Tx) error) error { commits.Add(1); return real(f) }
	b.SetParallelism(32) // times GOMAXPROCS, which is set to 2 below
	prev := runtime.GOMAXPROCS(2)
	defer runtime.GOMAXPROCS(prev)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.Put(b.Context(), Record{Key: fmt.Sprintf("key/%09d", n.Add(1)), Value: benchValue}); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(one)/(float64(b.Elapsed())/float64(b.N)), "x-one")
	b.ReportMetric(float64(n.Load())/float64(commits.Load()), "puts/commit")
}
