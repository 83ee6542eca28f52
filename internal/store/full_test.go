package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestDiskFull fills a small file system through the store, twice: with room
// for nothing more in the file, and with room in the file but none on the disk.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, "512k")
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s.db")
	b := open(t, path)
	acked := 0
	fill := func() error {
		for {
			if acked > 10_000 {
				t.Fatal("the disk does not get full")
			}
			_, err := b.Put(t.Context(), Record{Key: fmt.Sprintf("k%05d", acked), Value: make([]byte, 1000)})
			if err != nil {
				return err
			}
			acked++
		}
	}
	want := func(when string) {
		t.Helper()
		if got := len(all(t, b)); got != acked {
			t.Errorf("%s: %d records, %d acknowledged", when, got, acked)
		}
	}
	for range 3 { // it stays an ordinary error
		err := fill()
		if errors.Is(err, ErrUncertain) || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "no space left") || !strings.Contains(err.Error(), path) {
			t.Fatalf("full disk: %v", err)
		}
		want("while full")
	}
	if acked < 50 {
		t.Errorf("full after %d records", acked)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	before := acked
	if err := fill(); err == nil || acked == before {
		t.Errorf("room again: %d records more, then %v", acked-before, err)
	}
	want("full again")
	if err := b.DeletePrefix(t.Context(), "k0000"); err != nil {
		t.Logf("deleting on a full disk: %v", err) // a copy of each changed page has to fit
	} else {
		acked -= 10
	}
	want("after deleting")
	if err := check(path); !errors.Is(err, ErrBusy) {
		t.Errorf("check beside the open store: %v", err)
	}
}

// TestCreateOnFullDisk: a store that cannot be made leaves nothing.
func TestCreateOnFullDisk(t *testing.T) {
	dir := smallDisk(t, "16k")
	path := filepath.Join(dir, "s.db")
	if b, err := Open(path, Options{}); err == nil {
		_ = b.Close()
		t.Fatal("a store of 32 KiB fits into 16")
	} else if !strings.Contains(err.Error(), path) || errors.Is(err, ErrDamaged) {
		t.Errorf("error %v", err)
	}
	if m, _ := filepath.Glob(dir + "/*"); len(m) != 0 {
		t.Errorf("left behind: %v", m)
	}
}

// smallDisk is a file system of its own. Without root it skips, but not where
// everything is meant to run.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if os.Getenv("REQUIRE_NETNS") == "1" {
			t.Fatalf("mount a small tmpfs: %v", err)
		}
		t.Skipf("needs the privilege to mount a tmpfs (CAP_SYS_ADMIN): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}
