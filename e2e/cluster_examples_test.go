//go:build e2e

package e2e

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"
)

// TestClusterExamples runs every file of examples/cluster on two hosts.
func TestClusterExamples(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 2)
	for _, e := range all {
		for name, cmd := range standIns {
			e.must(t, "import", "--change", cmd, suite.image, name)
		}
	}
	files, err := filepath.Glob("../examples/cluster/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	tests := map[string]func(t *testing.T, file string){"peers.yaml": all.peersExample, "stack.yaml": all.stackExample}
	for _, f := range files {
		run, ok := tests[filepath.Base(f)]
		if !ok {
			t.Errorf("%s is not tested", f)
			continue
		}
		t.Run(filepath.Base(f), func(t *testing.T) { run(t, f) })
	}
}

// peersExample runs the same file on both hosts, with another range on each.
func (all members) peersExample(t *testing.T, file string) {
	t.Helper()
	all.join(t)
	env := func(i int) []string { return []string{fmt.Sprintf("IP_RANGE=10.44.%d.0/24", i+1)} }
	for i, e := range all {
		if err := e.compose(env(i), file, "shop", "up", "-d"); err != nil {
			t.Fatal(err)
		}
	}
	all.tasksTalk(t, "label=com.docker.compose.service=web", "shop_blue")
	for i, e := range all {
		web := e.must(t, "ps", "-q", "--filter", "label=com.docker.compose.service=web")
		e.sees(t, e.lan.client, e.vtep()+":8080", e.must(t, "inspect", "-f", "{{.Config.Hostname}}", web))
		if err := e.compose(env(i), file, "shop", "down"); err != nil {
			t.Error(err)
		}
	}
	for _, e := range all {
		e.checkCleanIn(t, 40*time.Second)
		e.must(t, "plugin", "disable", "-f", e.plugin)
		e.must(t, "plugin", "set", e.plugin, "PEERS=", "SECRET=", "UNDERLAY=")
		e.must(t, "plugin", "enable", e.plugin)
	}
}

// stackExample deploys the file on a swarm whose nodes have the plugin a second
// time, beside the one for local networks.
func (all members) stackExample(t *testing.T, file string) {
	t.Helper()
	for i, e := range all {
		if i == 0 {
			e.initSwarm(t)
		} else {
			e.joinSwarm(t, all[0], "worker")
		}
	}
	for _, e := range all {
		e.plugin = "weft-swarm"
		e.installPlugin(t, "SCOPE=global")
	}
	all[0].must(t, "stack", "deploy", "--resolve-image", "never", "-c", file, "shop")
	all.tasks(t, "shop_web", "shop_green")
	all.tasksTalk(t, "label=com.docker.swarm.service.name=shop_web", "shop_green")
	all[0].must(t, "stack", "rm", "shop")
	all.empty(t)
	for _, e := range all {
		e.checkCleanIn(t, 40*time.Second)
	}
	for i := range all {
		all[len(all)-1-i].must(t, "swarm", "leave", "--force")
	}
}

// tasksTalk has the one container of each host that a filter finds reach those
// of the others, which say their own host names.
func (all members) tasksTalk(t *testing.T, filter, network string) {
	t.Helper()
	ids := make([]string, len(all))
	for i, e := range all {
		ids[i] = e.must(t, "ps", "-q", "--filter", filter)
	}
	for i, from := range all {
		for j, to := range all {
			checkTask(t, from, ids[i], to.addresses(t, ids[j], network)[0], to.must(t, "inspect", "-f", "{{.Config.Hostname}}", ids[j]))
		}
	}
	all.exact(t, network, 15*time.Second)
}
