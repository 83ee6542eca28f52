//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// The subnets of overlay networks.
const (
	blue4, blue6 = "10.44.0.0/16", "fd44::/64"
	blueVNI      = "4242"
	secret       = "correct horse battery staple"
)

// members are hosts that know each other.
type members []*engine

// underlayAddr is the address of the nth host, counted from 1.
func underlayAddr(n int) string { return fmt.Sprintf("198.51.100.%d", 10+n) }

// newMembers makes n hosts with engines on one LAN.
func newMembers(tb testing.TB, n int) members {
	tb.Helper()
	l := newLAN(tb)
	var all members
	for i := range n {
		addrs := []string{underlayAddr(i+1) + "/24", fmt.Sprintf("2001:db8:1::%d/64", 10+i+1)}
		all = append(all, l.host(tb, fmt.Sprintf("host%d", i+1), addrs, nil, func(*engine) {}))
	}
	return all
}

// join installs the plugin on all hosts; each knows one other.
func (all members) join(tb testing.TB, settings ...string) {
	tb.Helper()
	for i, e := range all {
		peer := underlayAddr((i+1)%len(all) + 1)
		e.installPlugin(tb, append([]string{"PEERS=" + peer, "SECRET=" + secret, "UNDERLAY=lan0"}, settings...)...)
	}
}

// network makes an overlay network on all hosts, each with its part of the
// subnet.
func (all members) network(tb testing.TB, name string) {
	tb.Helper()
	for i, e := range all {
		e.must(tb, "network", "create", "-d", ours, "--ipam-driver", ours, "--ipv6", "-o", "mode=overlay", "-o", "vni="+blueVNI,
			"--subnet", blue4, "--ip-range", fmt.Sprintf("10.44.%d.0/24", i+1), "--subnet", blue6, "--ip-range", fmt.Sprintf("fd44::%d:0/112", i+1), name)
	}
}

// addresses are those of a container on a network.
func (e *engine) addresses(tb testing.TB, container, network string) []string {
	tb.Helper()
	format := fmt.Sprintf("{{with index .NetworkSettings.Networks %q}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}", network)
	return strings.Fields(e.must(tb, "inspect", "-f", format, container))
}

// reach waits until every container of the list reaches every other one on the
// network blue.
func (all members) reach(tb testing.TB, containers []string) {
	tb.Helper()
	for i, from := range all {
		for j, to := range all {
			for _, a := range to.addresses(tb, containers[j], "blue") {
				from.dials(tb, containers[i], a, to.name)
			}
		}
	}
}

// dials waits until a container reaches an address, by TCP and UDP, where the
// host answers that is named so.
func (e *engine) dials(tb testing.TB, container, addr, name string) {
	tb.Helper()
	if strings.Contains(addr, ":") {
		addr = "[" + addr + "]"
	}
	for proto, port := range map[string]string{"tcp": ":80", "udp": ":53"} {
		eventually(tb, 5*time.Second, fmt.Sprintf("%s on %s reaches %s by %s", container, e.name, addr, proto), func() error {
			c, err := e.in(container, "/probe", "dial", "-timeout", "1s", proto, addr+port)
			if err != nil {
				return err
			}
			out, err := output(c)
			if err == nil && !strings.Contains(out, fmt.Sprintf("%q", name)) {
				err = errors.New(strings.TrimSpace(out))
			}
			return err
		})
	}
}

// TestOverlayPeers is three hosts that know each other by PEERS.
func TestOverlayPeers(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	all.join(t)
	all.network(t, "blue")
	containers := []string{"alpha", "beta", "gamma"}
	for i, e := range all {
		e.run(t, containers[i], "--network", "blue", "--hostname", e.name)
	}
	all.reach(t, containers)
	all.agree(t, "blue")
	for _, e := range all {
		e.checkAgrees(t)
		for l := range strings.Lines(e.net(t, "conntrack", "-L")) {
			if strings.Contains(l, "src=10.44.") || strings.Contains(l, "dport=4793") {
				t.Errorf("%s tracks what it only switches: %s", e.name, l)
			}
		}
	}
	for i, e := range slices.Backward(all) {
		e.must(t, "rm", "-f", containers[i])
		e.must(t, "network", "rm", "blue")
	}
	for _, e := range all {
		e.checkCleanIn(t, 40*time.Second)
	}
}

// TestOverlaySwarm is a swarm of three whose plugins are told nothing but their
// scope: a service on all nodes, names across nodes, an attached container.
func TestOverlaySwarm(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	manager := all[0]
	manager.initSwarm(t)
	for _, e := range all[1:] {
		e.joinSwarm(t, manager, "worker")
	}
	for _, e := range all {
		e.installPlugin(t, "SCOPE=global")
	}
	manager.must(t, "network", "create", "-d", ours, "--ipam-driver", ours, "--attachable", "--subnet", "10.45.0.0/16", "green")
	manager.globalService(t, "web", "green")
	tasks := all.tasks(t, "web", "green")
	all.talk(t, tasks)
	all[1].run(t, "attached", "--network", "green")
	for i := range all {
		all[1].dials(t, "attached", tasks[i].addr, all[i].name)
	}
	all.agree(t, "green")
	for _, name := range []string{"web", "tasks.web", "attached"} {
		all[2].finds(t, tasks[2].container, name)
	}
	all[1].must(t, "rm", "-f", "attached")
	manager.must(t, "service", "rm", "web")
	all.empty(t)
	manager.must(t, "network", "rm", "green")
	for _, e := range slices.Backward(all) {
		e.checkCleanIn(t, 40*time.Second)
		e.must(t, "swarm", "leave", "--force")
	}
}

// initSwarm makes a swarm of the host alone.
func (e *engine) initSwarm(tb testing.TB) {
	tb.Helper()
	e.must(tb, "swarm", "init", "--advertise-addr", e.vtep())
}

// joinSwarm joins that of a manager, as "manager" or "worker".
func (e *engine) joinSwarm(tb testing.TB, manager *engine, as string) {
	tb.Helper()
	token := manager.must(tb, "swarm", "join-token", "-q", as)
	e.must(tb, "swarm", "join", "--advertise-addr", e.vtep(), "--token", token, manager.vtep()+":2377")
}

// globalService has a task on each node.
func (e *engine) globalService(tb testing.TB, name, network string) {
	tb.Helper()
	e.must(tb, "service", "create", "--detach", "--no-resolve-image", "--name", name, "--network", network, "--endpoint-mode", "dnsrr",
		"--mode", "global", "--hostname", "{{.Node.Hostname}}", "--stop-signal", "KILL", image)
}

// talk has each task reach all.
func (all members) talk(tb testing.TB, tasks []task) {
	tb.Helper()
	for i, e := range all {
		for j, to := range all {
			e.dials(tb, tasks[i].container, tasks[j].addr, to.name)
		}
	}
}

// finds waits until a container reaches another by a name.
func (e *engine) finds(tb testing.TB, container, name string) {
	tb.Helper()
	eventually(tb, 10*time.Second, "by the name "+name, func() error {
		c, err := e.in(container, "/probe", "dial", "-timeout", "2s", "tcp", name+":80")
		if err != nil {
			return err
		}
		out, err := output(c)
		if err == nil && strings.Contains(out, `"err"`) {
			err = errors.New(out)
		}
		return err
	})
}

// empty waits until no container runs.
func (all members) empty(tb testing.TB) {
	tb.Helper()
	for _, e := range all {
		eventually(tb, 20*time.Second, "tasks end", func() error {
			if out := e.must(tb, "ps", "-q"); out != "" {
				return fmt.Errorf("%s still runs %s", e.name, out)
			}
			return nil
		})
	}
}

// tasks waits until each host runs one task of a service.
func (all members) tasks(tb testing.TB, service, network string) []task {
	tb.Helper()
	tasks := make([]task, len(all))
	eventually(tb, 60*time.Second, "one task on each host", func() error {
		for i, e := range all {
			ids := strings.Fields(e.must(tb, "ps", "-q", "--filter", "label=com.docker.swarm.service.name="+service))
			if len(ids) != 1 {
				out, err := all[0].docker("service", "ps", "--no-trunc", "--format", "{{.Node}} {{.CurrentState}} {{.Error}}", service)
				return errors.Join(fmt.Errorf("%s runs %d tasks: %s", e.name, len(ids), out), err)
			}
			addrs := e.addresses(tb, ids[0], network)
			if len(addrs) == 0 {
				return fmt.Errorf("task on %s has no address", e.name)
			}
			tasks[i] = task{ids[0], addrs[0]}
		}
		return nil
	})
	return tasks
}
