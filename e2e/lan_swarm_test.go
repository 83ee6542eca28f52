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

// TestLANSwarm is one LAN, two hosts, one swarm: a network of each node's own,
// with the same subnet and a part of it for each node.
func TestLANSwarm(t *testing.T) {
	t.Parallel()
	manager := newEngine(t, nil)
	worker := manager.lan.host(t, "other", []string{"198.51.100.3/24", "2001:db8:1::3/64"}, nil, func(*engine) {})
	hosts := []*engine{manager, worker}
	parts := []string{"198.51.100.128/26", "198.51.100.192/26"}
	for _, e := range hosts {
		e.installPlugin(t)
	}
	manager.must(t, "swarm", "init", "--advertise-addr", host4)
	token := manager.must(t, "swarm", "join-token", "-q", "worker")
	worker.must(t, "swarm", "join", "--advertise-addr", "198.51.100.3", "--token", token, host4+":2377")
	for i, e := range hosts {
		e.must(t, "network", "create", "--config-only", "--ipam-driver", ours, "--subnet", lan4, "--ip-range", parts[i], "--gateway", client4,
			"-o", "mode=macvlan", "-o", "parent=lan0", "lan-here")
	}
	manager.must(t, "network", "create", "-d", ours, "--scope", "swarm", "--attachable", "--config-from", "lan-here", "lan")
	manager.must(t, "service", "create", "--detach", "--no-resolve-image", "--name", "web", "--network", "lan", "--endpoint-mode", "dnsrr",
		"--replicas", "2", "--placement-pref", "spread=node.id", "--hostname", "{{.Node.Hostname}}", "--stop-signal", "KILL", image)

	tasks := waitTasks(t, hosts)
	checkTasks(t, hosts, tasks)
	manager.run(t, "attached", "--network", "lan")
	checkTask(t, manager, "attached", tasks[1].addr, "other")

	worker.kill(t)
	time.Sleep(time.Second)
	worker.start(t)
	worker.waitPlugin(t)
	tasks = waitTasks(t, hosts)
	checkTasks(t, hosts, tasks)

	manager.must(t, "rm", "-f", "attached")
	manager.must(t, "service", "rm", "web")
	eventually(t, 20*time.Second, "tasks end", func() error {
		for _, e := range hosts {
			if out := e.must(t, "ps", "-q"); out != "" {
				return fmt.Errorf("%s still runs %s", e.name, out)
			}
		}
		return nil
	})
	manager.must(t, "network", "rm", "lan")
	for _, e := range slices.Backward(hosts) {
		e.checkCleanIn(t, 40*time.Second)
	}
	worker.must(t, "swarm", "leave")
	manager.must(t, "swarm", "leave", "--force")
}

// task is one task of the service.
type task struct{ container, addr string }

// waitTasks waits until each host runs one task of the service, and knows it.
func waitTasks(t *testing.T, hosts []*engine) []task {
	t.Helper()
	tasks := make([]task, len(hosts))
	eventually(t, 60*time.Second, "one task on each host", func() error {
		for i, e := range hosts {
			ids := strings.Fields(e.must(t, "ps", "-q", "--filter", "label=com.docker.swarm.service.name=web"))
			if len(ids) != 1 {
				out, err := hosts[0].docker("service", "ps", "--no-trunc", "--format", "{{.Node}} {{.CurrentState}} {{.Error}}", "web")
				return errors.Join(fmt.Errorf("%s runs %d tasks: %s", e.name, len(ids), out), err)
			}
			addr, err := e.docker("inspect", "-f", "{{.NetworkSettings.Networks.lan.IPAddress}}", ids[0])
			if err != nil || addr == "" {
				return fmt.Errorf("task on %s has address %q: %w", e.name, addr, err)
			}
			tasks[i] = task{ids[0], addr}
		}
		return nil
	})
	return tasks
}

// checkTasks fails unless every task has an address of its host's part, reaches
// the other one and the LAN, and is reached from there.
func checkTasks(t *testing.T, hosts []*engine, tasks []task) {
	t.Helper()
	first := hosts[0]
	for i, e := range hosts {
		other := 1 - i
		checkTask(t, e, tasks[i].container, tasks[other].addr, hosts[other].name)
		first.sees(t, first.lan.client, tasks[i].addr+":80", e.name)
		first.sees(t, first.lan.client, tasks[i].addr+":80", client4)
	}
	if tasks[0].addr == tasks[1].addr {
		t.Errorf("both tasks have %s", tasks[0].addr)
	}
}

// checkTask dials from a container to an address, where name should answer.
func checkTask(t *testing.T, e *engine, container, addr, name string) {
	t.Helper()
	c, err := e.in(container, "/probe", "dial", "-timeout", "1500ms", "-wait", "5s", "tcp", addr+":80")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := output(c); err != nil || !strings.Contains(out, fmt.Sprintf("%q", name)) {
		t.Errorf("%s on %s to %s: %s %v, want %s", container, e.name, addr, strings.TrimSpace(out), err, name)
	}
}
