//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestStay has containers that ask for no address restart in every way, on a
// network of ours and on one of the built-in driver's beside it: whatever keeps
// its address there keeps it here, with the MAC address. Engines before 29 do not
// say which container an address is for.
func TestStay(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.oursNetwork(t, "ours", "--subnet", net1)
	e.must(t, "network", "create", "--subnet", net2, "theirs")
	e.oursNetwork(t, "lan", "-o", "mode=macvlan", "-o", "parent=lan0", "-o", "probe=false", "--subnet", "198.51.100.0/24", "--gateway", client4, "--ip-range", "198.51.100.192/26")
	networks := []string{"ours", "theirs", "lan"}
	each := func(f func(network string)) {
		t.Helper()
		var all sync.WaitGroup
		for _, n := range networks {
			all.Go(func() { f(n) })
		}
		all.Wait()
	}
	docker := func(args ...string) {
		t.Helper()
		if _, err := e.docker(args...); err != nil {
			t.Error(err)
		}
	}
	const letters = "abcd"
	each(func(n string) {
		for _, c := range letters {
			policy := "always"
			if c == 'a' || c == 'c' {
				policy = "no"
			}
			e.run(t, fmt.Sprintf("%s-%c", n, c), "--network", n, "--restart", policy)
		}
	})
	before := map[string]place{}
	places := func() map[string]place {
		t.Helper()
		ids := strings.Fields(e.must(t, "ps", "-aq"))
		out := e.must(t, append([]string{"inspect", "-f", `{{.Name}} {{range .NetworkSettings.Networks}}{{.IPAddress}} {{.MacAddress}}{{end}}`}, ids...)...)
		all := map[string]place{}
		for l := range strings.Lines(out) {
			if f := strings.Fields(l); len(f) == 3 {
				all[strings.TrimPrefix(f[0], "/")] = place{IPAddress: f[1], MacAddress: f[2]}
			}
		}
		return all
	}
	// kept is how many of a network's have the address they had.
	kept := func(n string, now map[string]place) (count int, moved []string) {
		for _, c := range letters {
			name := fmt.Sprintf("%s-%c", n, c)
			switch {
			case now[name] == before[name], n == "theirs" && now[name].IPAddress == before[name].IPAddress: // from 28 on the MAC address is a random one there
				count++
			default:
				moved = append(moved, fmt.Sprintf("%s has %v, before %v", name, now[name], before[name]))
			}
		}
		return count, moved
	}
	stays := func(what string) {
		t.Helper()
		now := places()
		theirs, _ := kept("theirs", now)
		for _, n := range []string{"ours", "lan"} {
			if _, moved := kept(n, now); moved != nil {
				t.Errorf("%s: of the built-in driver's %d kept their addresses, of ours %s", what, theirs, strings.Join(moved, ", "))
			}
		}
		t.Logf("%s: %d of the built-in driver's 4 kept their addresses", what, theirs)
	}
	before = places()
	each(func(n string) {
		for _, c := range letters {
			docker("restart", "-t", "0", fmt.Sprintf("%s-%c", n, c))
		}
	})
	stays("restarted one after the other")

	each(func(n string) { docker("stop", "-t", "0", n+"-a", n+"-c") })
	time.Sleep(4 * time.Second) // a restart within three would take their addresses for its own
	each(func(n string) { docker("restart", "-t", "0", n+"-d") })
	each(func(n string) { docker("restart", "-t", "0", n+"-b") })
	each(func(n string) { docker("start", n+"-a") })
	each(func(n string) { docker("start", n+"-c") })
	stays("two were stopped while the others restarted")

	// One is stopped, so that it does not come back with the engine, and one is
	// left that does: in which order several do is anybody's guess.
	each(func(n string) { docker("rm", "-f", n+"-d", n+"-c") })
	each(func(n string) { docker("stop", "-t", "0", n+"-a") })
	alone := func(what, letters string) {
		t.Helper()
		now := places()
		for name, was := range before {
			if !strings.HasPrefix(name, "theirs") && strings.Contains(letters, name[len(name)-1:]) && now[name] != was {
				t.Errorf("%s: %s has %v, before %v", what, name, now[name], was)
			}
		}
		t.Logf("%s: the built-in driver's have %v, before %v", what, now["theirs-b"], before["theirs-b"])
	}
	e.kill(t)
	e.start(t)
	e.waitPlugin(t)
	alone("engine killed", "b")
	e.reboot(t)
	e.waitPlugin(t)
	alone("host rebooted", "b")
	e.stop(t)
	e.start(t)
	e.waitPlugin(t)
	alone("engine restarted", "b")
	each(func(n string) { docker("start", n+"-a") })
	alone("and the other one started", "ab")
}
