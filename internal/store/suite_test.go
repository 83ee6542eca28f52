package store_test

import (
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/storetest"
)

func TestSuite(t *testing.T) {
	for name, opts := range map[string]store.Options{"synced": {}, "unsynced": {NoSync: true}} {
		t.Run(name, func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) storetest.Store {
				t.Helper()
				path := filepath.Join(t.TempDir(), "s.db")
				b, err := store.Open(path, opts)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := b.Close(); err != nil {
						t.Error(err)
					}
					b, err := store.Open(path, opts) // which checks it
					if err != nil {
						t.Fatal(err)
					}
					if err := b.Close(); err != nil {
						t.Error(err)
					}
				})
				return b
			})
		})
	}
}
