//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// vni is the number that the swarm's leader chose for a network.
func (e *engine) vni(tb testing.TB, network string) string {
	tb.Helper()
	var vni string
	eventually(tb, 15*time.Second, "network "+network+" has a VNI", func() error {
		out, err := e.docker("network", "inspect", "-f", "{{.Options.vni}}", network)
		if err == nil && (out == "" || strings.Contains(out, "no value")) {
			err = errors.New("it has none")
		}
		vni = out
		return err
	})
	return vni
}

// leader waits until one of the managers, as one of them sees it, is leader.
func (all members) leader(tb testing.TB, ask *engine, not string) *engine {
	tb.Helper()
	var leader *engine
	eventually(tb, 60*time.Second, "the swarm has a leader", func() error {
		out, err := ask.docker("node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		if err != nil {
			return err
		}
		for _, e := range all {
			if e.name != not && strings.Contains(out, e.name+" Leader") {
				leader = e
				return nil
			}
		}
		return errors.New(out)
	})
	return leader
}

// makeLeader has one of the managers lead, and others be managers no more as
// far as that takes.
func (all members) makeLeader(tb testing.TB, e *engine) {
	tb.Helper()
	demoted := ""
	for range all {
		leader := all.leader(tb, e, demoted)
		if leader == e {
			return
		}
		demoted = leader.name
		e.must(tb, "node", "demote", demoted)
	}
	tb.Fatalf("%s does not lead", e.name)
}

// TestOverlaySwarmLeader is three managers, of which the leader dies, comes back
// and leads again, and a node that joins later.
func TestOverlaySwarmLeader(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	first := all[0]
	first.initSwarm(t)
	for _, e := range all[1:] {
		e.joinSwarm(t, first, "manager")
	}
	for _, e := range all {
		e.installPlugin(t, "SCOPE=global")
	}
	first = all.leader(t, first, "")
	first.must(t, "network", "create", "-d", ours, "--ipam-driver", ours, "--attachable", "--subnet", "10.45.0.0/16", "green")
	first.must(t, "network", "create", "-d", ours, "--ipam-driver", "default", "--attachable", "--subnet", "10.46.0.0/16", "lime")
	green, lime := first.vni(t, "green"), first.vni(t, "lime")
	if green == lime {
		t.Errorf("two networks have VNI %s", green)
	}
	for _, name := range []string{"green", "lime"} {
		first.globalService(t, "on-"+name, name)
		tasks := all.tasks(t, "on-"+name, name)
		all.talk(t, tasks)
		all[2].finds(t, tasks[2].container, "tasks.on-"+name)
		all.exact(t, name, 15*time.Second)
	}

	// Nobody is told of a refusal: the command has ended. The leader's log has it.
	first.must(t, "network", "create", "-d", ours, "-o", "mode=macvlan", "-o", "parent=lan0", "refused")
	eventually(t, 10*time.Second, "mode macvlan is refused", func() error {
		b, err := os.ReadFile(first.log())
		if err == nil && !strings.Contains(string(b), "only mode overlay spans a swarm: make it on each node with --config-only") {
			err = errors.New("the leader's log does not say what to do instead")
		}
		return err
	})
	first.must(t, "network", "rm", "refused")

	// One that was not there when the networks were made.
	late := first.lan.host(t, "late", []string{underlayAddr(4) + "/24", "2001:db8:1::14/64"}, nil, func(*engine) {})
	late.joinSwarm(t, first, "worker")
	late.installPlugin(t, "SCOPE=global")
	with := append(slices.Clone(all), late)
	tasks := with.tasks(t, "on-green", "green")
	with.talk(t, tasks)
	with.exact(t, "green", 15*time.Second)

	first.kill(t)
	rest := slices.DeleteFunc(slices.Clone(with), func(e *engine) bool { return e == first })
	next := all.leader(t, rest[0], first.name)
	next.must(t, "network", "create", "-d", ours, "--ipam-driver", ours, "--attachable", "--subnet", "10.47.0.0/16", "olive")
	if olive := next.vni(t, "olive"); olive == green || olive == lime {
		t.Errorf("after a change of leader a new network has the VNI of an old one: %s of %s, %s", olive, green, lime)
	}
	if now := next.vni(t, "green"); now != green {
		t.Errorf("network green has VNI %s under the new leader, had %s", now, green)
	}
	next.run(t, "attached", "--network", "green")
	next.run(t, "olive1", "--network", "olive")
	late.run(t, "olive2", "--network", "olive")
	next.dials(t, "olive1", late.addresses(t, "olive2", "olive")[0], "olive2")
	late.dials(t, tasks[3].container, next.addresses(t, "attached", "green")[0], "attached")

	first.start(t)
	first.waitPlugin(t)
	started := time.Now()
	for _, name := range []string{"green", "lime"} {
		tasks := with.tasks(t, "on-"+name, name)
		with.talk(t, tasks)
		first.finds(t, tasks[slices.Index(with, first)].container, "tasks.on-"+name)
		note("swarm, leader killed and back: entries of %s exact after %v", name, with.exact(t, name, 30*time.Second))
	}
	if now := first.vni(t, "green"); now != green {
		t.Errorf("network green has VNI %s on the old leader, had %s", now, green)
	}

	next.must(t, "rm", "-f", "attached", "olive1")
	late.must(t, "rm", "-f", "olive2")
	next.must(t, "service", "rm", "on-green", "on-lime")
	with.empty(t)
	next.must(t, "network", "rm", "green", "lime", "olive")
	for _, e := range rest {
		e.checkCleanIn(t, 40*time.Second)
	}
	// The swarm frees with the leader of the day what another leader allocated:
	// that one is told nothing, and its IPAM keeps the pool.
	eventually(t, 40*time.Second, "the old leader is clean", func() error {
		left := slices.DeleteFunc(first.remains(t), func(l string) bool {
			return strings.HasPrefix(l, "pool weft-global,")
		})
		if len(left) > 0 {
			return errors.New(strings.Join(left, "\n"))
		}
		return nil
	})

	// Until it leads again, for then it has to give way to what others allocate.
	// A process takes no election for one before it is 30 s old.
	time.Sleep(time.Until(started.Add(35 * time.Second)))
	all.makeLeader(t, first)
	for _, x := range []struct{ name, subnet, vni string }{
		{"teal", "10.45.0.0/17", green}, // a part of green's
		{"navy", "10.45.0.0/16", lime},
	} {
		first.must(t, "network", "create", "-d", ours, "--ipam-driver", ours, "--attachable", "--subnet", x.subnet, "-o", "vni="+x.vni, x.name)
		if vni := first.vni(t, x.name); vni != x.vni {
			t.Errorf("network %s has VNI %s, asked for was %s", x.name, vni, x.vni)
		}
		first.run(t, x.name+"1", "--network", x.name)
		late.run(t, x.name+"2", "--network", x.name)
		first.dials(t, x.name+"1", late.addresses(t, x.name+"2", x.name)[0], x.name+"2")
		first.must(t, "rm", "-f", x.name+"1")
		late.must(t, "rm", "-f", x.name+"2")
		eventually(t, 20*time.Second, "remove network "+x.name, func() error {
			_, err := first.docker("network", "rm", x.name)
			return err
		})
		first.checkCleanIn(t, 40*time.Second)
	}
	for _, e := range slices.Backward(with) {
		e.must(t, "swarm", "leave", "--force")
	}
}

// TestOverlaySwarmVersions is managers of the old engine and workers of the new
// one in a swarm. The first run on a machine bootstraps a tree of the new one.
func TestOverlaySwarmVersions(t *testing.T) {
	t.Parallel()
	l := newLAN(t)
	var all members
	for i, which := range []string{"20", "20", "28", "28"} {
		v, err := chooseVersion(which)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, l.hostOf(t, v, fmt.Sprintf("host%d", i+1), []string{underlayAddr(i+1) + "/24"}, nil, func(*engine) {}))
	}
	manager := all[0]
	manager.initSwarm(t)
	for i, e := range all[1:] {
		e.joinSwarm(t, manager, []string{"manager", "worker", "worker"}[i])
	}
	for _, e := range all {
		e.installPlugin(t, "SCOPE=global")
	}
	manager.must(t, "network", "create", "-d", ours, "--ipam-driver", ours, "--attachable", "--subnet", "10.45.0.0/16", "green")
	manager.globalService(t, "web", "green")
	tasks := all.tasks(t, "web", "green")
	all.talk(t, tasks)
	for i, e := range all {
		e.finds(t, tasks[i].container, "tasks.web")
	}
	all[3].run(t, "attached", "--network", "green")
	manager.dials(t, tasks[0].container, all[3].addresses(t, "attached", "green")[0], "attached")
	all.exact(t, "green", 15*time.Second)
	all[3].must(t, "rm", "-f", "attached")
	manager.must(t, "service", "rm", "web")
	all.empty(t)
	manager.must(t, "network", "rm", "green")
	for _, e := range slices.Backward(all) {
		e.checkCleanIn(t, 40*time.Second)
		e.must(t, "swarm", "leave", "--force")
	}
}
