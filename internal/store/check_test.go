package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// TestCheckFinds damage that leaves every page and every record well formed.
func TestCheckFinds(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(t *testing.T, path string)
		want string
	}{
		"a record gone": {func(t *testing.T, path string) {
			t.Helper()
			edit(t, path, func(k *bbolt.Bucket) error { return k.Delete([]byte("k3")) })
		}, "9 records found"},
		"an old value back": {func(t *testing.T, path string) {
			t.Helper()
			edit(t, path, func(k *bbolt.Bucket) error { return k.Put([]byte("k3"), encode([]byte("k3"), 1, []byte("old"))) })
		}, "10 records found"},
		"a page in use on the free list": {func(t *testing.T, path string) {
			t.Helper()
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			page := os.Getpagesize()
			meta := data[:page]
			if o := data[page : 2*page]; native.Uint64(o[64:]) > native.Uint64(meta[64:]) {
				meta = o
			}
			list := data[native.Uint64(meta[48:])*uint64(page):]
			if native.Uint16(list[10:]) == 0 {
				t.Fatal("no page is free")
			}
			native.PutUint64(list[element:], native.Uint64(meta[32:])) // the root
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "both in use and free"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s.db")
			b, err := Open(path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 10 {
				mustPut(t, b, fmt.Sprintf("k%d", i), "")
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			c.harm(t, path)
			if _, err := Open(path, Options{}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func edit(t *testing.T, path string, f func(*bbolt.Bucket) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error { return f(tx.Bucket(bucketRecords)) })
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestGoneBeforeCommit: a write whose caller has left is not carried out.
func TestGoneBeforeCommit(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "s.db"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	write := func(ctx context.Context, key string) *op {
		return &op{ctx: ctx, run: func(k *bucket) error { _, err := k.put(Record{Key: key}); return err }}
	}
	batch := []*op{write(ctx, "left"), write(t.Context(), "stayed")}
	if err, broken := b.commitBatch(batch); err != nil || broken != nil {
		t.Fatal(err, broken)
	}
	if !errors.Is(batch[0].err, context.Canceled) || batch[1].err != nil {
		t.Errorf("errors %v and %v", batch[0].err, batch[1].err)
	}
	if got := all(t, b); len(got) != 1 || got[0].Key != "stayed" {
		t.Errorf("records %v", got)
	}
}

// TestSynced: only what was asked for is left unsynced.
func TestSynced(t *testing.T) {
	if b := open(t, filepath.Join(t.TempDir(), "s.db")); b.db.NoSync || b.db.NoGrowSync {
		t.Error("writes are not synced")
	}
	b, err := OpenBoot(filepath.Join(t.TempDir(), "run.db"), "1")
	if err != nil {
		t.Fatal(err)
	}
	if !b.db.NoSync {
		t.Error("the file of this boot is synced")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}
