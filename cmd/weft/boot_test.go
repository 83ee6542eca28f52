package main

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/store"
)

// TestOwnBoot: a database of endpoints that is new says nothing about containers, if
// the host had one in this boot before.
func TestOwnBoot(t *testing.T) {
	dir := t.TempDir()
	log := logrus.New()
	log.SetOutput(io.Discard)
	start := func(when, boot string, want bool) {
		t.Helper()
		weft, err := store.Open(filepath.Join(dir, "weft.db"), store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		run, err := store.OpenBoot(filepath.Join(dir, "run.db"), boot)
		if err != nil {
			t.Fatal(err)
		}
		lost, err := ownBoot(t.Context(), weft, run, boot, log)
		if err != nil || lost != want {
			t.Errorf("%s: lost %t, %v", when, lost, err)
		}
		if err := weft.Close(); err != nil {
			t.Error(err)
		}
		if err := run.Close(); err != nil {
			t.Error(err)
		}
	}
	start("installed", "aaaa-01", false)
	start("restarted", "aaaa-01", false)
	start("rebooted", "aaaa-02", false)
	if err := os.Remove(filepath.Join(dir, "run-aaaa-02.db")); err != nil {
		t.Fatal(err)
	}
	start("lost", "aaaa-02", true)
	start("lost and restarted", "aaaa-02", true)
	start("rebooted again", "aaaa-03", false)
}
