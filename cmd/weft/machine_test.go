package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/overlay"
)

// TestOwnMachine: a copy of a machine is another host; one with a new card, a new
// board or without devices is not.
func TestOwnMachine(t *testing.T) {
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}()
	log, logs := logtest.NewNullLogger()
	last, err := overlay.Identity(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	duid := func() bool {
		_, err := db.Get(t.Context(), "ipam/duid")
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		return err == nil
	}
	lease := func() bool {
		_, err := db.Get(t.Context(), "ipam/lease/x")
		return err == nil
	}
	for _, step := range []struct {
		what   string
		facts  []string
		ask    bool
		id     bool // it changes
		leases bool // they stay
	}{
		{what: "the first start", facts: []string{"mac 1", "uuid 1"}, leases: true},
		{what: "the next", facts: []string{"mac 1", "uuid 1"}, leases: true},
		{what: "another card", facts: []string{"mac 2", "uuid 1"}, leases: true},
		{what: "another board with the same card", facts: []string{"mac 2", "uuid 2"}, leases: true},
		{what: "no devices", leases: true},
		{what: "a card of before", facts: []string{"mac 1"}, leases: true},
		{what: "a copy", facts: []string{"mac 3", "uuid 3"}, id: true},
		{what: "the copy again", facts: []string{"mac 3", "uuid 3"}, leases: true},
		{what: "the original has nothing to do with it", facts: []string{"mac 1", "uuid 1"}, id: true},
		{what: "somebody asks", facts: []string{"mac 1", "uuid 1"}, ask: true, id: true, leases: true},
		{what: "it was done", facts: []string{"mac 1", "uuid 1"}, leases: true},
	} {
		for _, key := range []string{"ipam/duid", "ipam/lease/x"} {
			if _, err := db.Put(t.Context(), store.Record{Key: key, Value: []byte("x")}); err != nil && !errors.Is(err, store.ErrExists) {
				t.Fatal(err)
			}
		}
		if step.ask {
			m, rev, err := readMachine(t.Context(), db)
			if err != nil {
				t.Fatal(err)
			}
			m.Renew = true
			if err := writeMachine(t.Context(), db, m, rev); err != nil {
				t.Fatal(err)
			}
		}
		logs.Reset()
		if err := ownMachine(t.Context(), db, step.facts, log); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		id, err := overlay.Identity(t.Context(), db)
		if err != nil {
			t.Fatal(err)
		}
		if (id != last) != step.id || duid() == step.id || lease() != step.leases || (len(logs.AllEntries()) == 1) != step.id {
			t.Errorf("%s: new ID %t, DUID left %t, leases left %t, log %v", step.what, id != last, duid(), lease(), logs.AllEntries())
		}
		last = id
	}
}

// TestNewID asks for one, and has it after the next start, once.
func TestNewID(t *testing.T) {
	netnstest.Enter(t)
	p := serveIn(t)
	id := func() string {
		t.Helper()
		p.stop(t)
		db, err := store.Open(filepath.Join(p.dir, "weft.db"), store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		id, err := overlay.Identity(t.Context(), db)
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "serve", "--socket", p.dir+"/p.sock", "--state", p.dir)
		cmd.Env = append(os.Environ(), asMain+"=1")
		p = startCmd(t, p.dir, cmd)
		p.must(t, "NetworkDriver.Leave", leaveNothing)
		return id
	}
	p.must(t, "NetworkDriver.Leave", leaveNothing)
	first := id()
	socket := filepath.Join(p.dir, adminSocket)
	if code, out, errs := weft(t, t.TempDir(), "cluster", "new-id", "-socket", socket); code != 0 || !strings.Contains(out, "docker plugin disable -f") {
		t.Fatalf("exit %d, %s%s", code, out, errs)
	}
	if got := id(); got != first {
		t.Errorf("the ID changed while the process ran: %s, %s", first, got)
	}
	second := id()
	if third := id(); second == first || third != second {
		t.Errorf("IDs %s, %s, %s: want one change", first, second, third)
	}
	p.stop(t)
	for _, words := range [][]string{{"cluster"}, {"cluster", "new-name"}, {"cluster", "new-id", "x"}} {
		if code, _, errs := weft(t, t.TempDir(), words...); code != 2 || !strings.Contains(errs, "cluster takes new-id") {
			t.Errorf("%q: exit %d, %s", words, code, errs)
		}
	}
}
