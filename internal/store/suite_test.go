package store_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/etcdtest"
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

func TestSuiteEtcd(t *testing.T) {
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d members", members), func(t *testing.T) {
			c := etcdtest.Start(t, etcdtest.Config{Members: members})
			n := 0
			storetest.Run(t, func(t *testing.T) storetest.Store {
				t.Helper()
				n++
				return openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints, Prefix: fmt.Sprintf("/test%d/", n)})
			})
		})
	}
}
