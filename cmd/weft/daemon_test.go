package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/store"
)

// TestLater: a registration is not an election.
func TestLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		f := later(func() { calls++ })
		for range 3 {
			f()
			time.Sleep(registering / 2)
		}
		if calls != 0 {
			t.Errorf("called %d times within %v", calls, registering)
		}
		f()
		if calls != 1 {
			t.Errorf("called %d times after it", calls)
		}
	})
}

// A state of a release without instances is that of the default one.
func TestServeStateWithoutInstance(t *testing.T) {
	netnstest.Enter(t)
	dir := t.TempDir()
	begin := func(args ...string) *process {
		cmd := exec.Command(os.Args[0], append([]string{"serve", "--socket", dir + "/p.sock", "--state", dir}, args...)...)
		cmd.Env = append(os.Environ(), asMain+"=1")
		return startCmd(t, dir, cmd)
	}
	p := begin("--scope", "local")
	p.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"n1","Options":{},"IPv4Data":[{"Pool":"10.7.0.0/24","Gateway":"10.7.0.1/24"}]}`)
	p.stop(t)
	db, err := store.Open(dir+"/weft.db", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Delete(t.Context(), instanceKey), db.Close()); err != nil {
		t.Fatal(err)
	}
	p = begin("--scope", "global")
	status, m := p.call(t, "NetworkDriver.Leave", leaveNothing)
	if text := fmt.Sprint(m["Err"]); status != 500 || !strings.Contains(text, "of instance local") || !strings.Contains(text, "set INSTANCE=local") {
		t.Errorf("the state of before: %d %v", status, m)
	}
	p.stop(t)
	p = begin("--scope", "global", "--instance", "local")
	p.must(t, "NetworkDriver.Leave", leaveNothing)
	p.stop(t)
}
