package store

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// FuzzOpen opens whatever it is given as a file. It must be refused, or be a
// store that can be read and written.
func FuzzOpen(f *testing.F) {
	path := filepath.Join(f.TempDir(), "s.db")
	b, err := Open(path, Options{NoSync: true})
	if err != nil {
		f.Fatal(err)
	}
	mustPut(f, b, "key", "value")
	if err := b.Close(); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, 0, byte(0))
	f.Add(good, 16400, byte(7))
	f.Add(good[:5000], 100, byte(255))
	f.Add([]byte("not a store"), 3, byte(1))
	f.Fuzz(func(t *testing.T, data []byte, at int, flip byte) {
		if len(data) > 1<<20 {
			return // bbolt maps the whole file
		}
		if at >= 0 && at < len(data) {
			data = bytes.Clone(data) // it belongs to the fuzzer
			data[at] ^= flip
		}
		path := filepath.Join(t.TempDir(), "f.db")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := Open(path, Options{NoSync: true})
		if err != nil {
			return
		}
		mustPut(t, b, "fuzz", "value")
		all(t, b)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if err := check(path); err != nil {
			t.Fatal(err)
		}
	})
}
