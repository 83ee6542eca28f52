//go:build e2e

package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// TestTwoInstances is what the documentation tells a swarm's nodes to do: a plugin
// for local networks and one for those of the swarm, with no setting but SCOPE.
// Neither touches what the other has, whatever happens to one of them.
func TestTwoInstances(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	swarm := new(engine)
	*swarm = *e
	swarm.plugin = "weft-swarm"
	swarm.installPlugin(t, "SCOPE=global")
	e.must(t, "swarm", "init", "--advertise-addr", host4)
	e.oursNetwork(t, "net1")
	e.must(t, "network", "create", "-d", "weft-swarm:latest", "--ipam-driver", "weft-swarm:latest", "--attachable", "green")
	e.run(t, "web", "--network", "net1", "-p", "8080:80")
	e.run(t, "near", "--network", "net1")
	for _, name := range []string{"one", "two"} {
		e.run(t, name, "--network", "green")
	}
	check := func() {
		t.Helper()
		e.sees(t, e.lan.client, host4+":8080", client4)
		e.dials(t, "near", e.address(t, "web", "net1"), "web")
		e.dials(t, "one", e.address(t, "two", "green"), "two")
	}
	check()
	before := e.linkNames(t)
	s := startStream(t, e.lan.client, host4+":8080")
	for _, p := range []*engine{e, swarm} {
		p.killPlugin(t)
		p.waitPlugin(t)
		time.Sleep(time.Second) // the engine registers it again
		check()
		if after := e.linkNames(t); after != before {
			t.Errorf("links before:\n%s\nafter a kill:\n%s", before, after)
		}
	}
	s.finish(t, "either instance killed")
	e.reboot(t)
	swarm.daemon = e.daemon
	e.waitPlugin(t)
	swarm.waitPlugin(t)
	e.must(t, "start", "web", "near")
	eventually(t, 30*time.Second, "the swarm's containers start", func() error {
		_, err := e.docker("start", "one", "two")
		return err
	})
	check()
	e.must(t, "rm", "-f", "one", "two")
	e.must(t, "network", "rm", "green")
	e.sees(t, e.lan.client, host4+":8080", client4)
	e.removeAll(t)
	for _, p := range []*engine{e, swarm} {
		p.checkCleanIn(t, 20*time.Second)
	}
	e.must(t, "swarm", "leave", "--force")
}

// linkNames are those of the host with what they are ports of.
func (e *engine) linkNames(tb testing.TB) string {
	tb.Helper()
	var names []string
	for _, l := range e.links(tb) {
		names = append(names, l.Name+" "+l.Master)
	}
	slices.Sort(names)
	return strings.Join(names, "\n")
}
