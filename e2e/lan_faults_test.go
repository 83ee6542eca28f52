//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestLANKilled kills the plugin's process while containers start and stop on
// the LAN, reached by the host and with a port each.
func TestLANKilled(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	e := w.e
	e.oursNetwork(t, "lan", lan4Args("-o", "mode=macvlan", "-o", "host_access=true")...)
	running := e.killUnderLoad(t, 100, "--network", "lan", "-p", "80")
	seen := map[string]string{}
	for _, name := range running {
		addr := e.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.lan.IPAddress}}", name)
		if other := seen[addr]; other != "" {
			t.Errorf("%s and %s have the same address %s", name, other, addr)
		}
		seen[addr] = name
		e.sees(t, e.lan.client, addr+":80", name)
		e.sees(t, e.machine, addr+":80", name)
		port, err := e.oursPort(t, addr, 80)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		e.sees(t, e.lan.client, fmt.Sprintf("%s:%d", host4, port), name)
	}
	e.removeAll(t)
	start := time.Now()
	e.checkCleanIn(t, 100*time.Second)
	note("plugin killed, LAN: clean %v after the last container", time.Since(start).Round(time.Second))
}

// TestLANMany has 200 containers on one parent.
func TestLANMany(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	e := w.e
	const containers = 200
	e.lan.client.net(t, "ip", "addr", "add", "10.220.0.254/24", "dev", "lan0")
	e.oursNetwork(t, "lan", "-o", "mode=macvlan", "-o", "parent=lan0", "-o", "probe=false", "--subnet", "10.220.0.0/24", "--gateway", "10.220.0.254")
	start := time.Now()
	var names []string
	var wg sync.WaitGroup
	slots := make(chan struct{}, 4)
	for c := range containers {
		name := fmt.Sprintf("c%d", c)
		names = append(names, name)
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if err := e.tryRun(name, "--network", "lan"); err != nil {
				t.Errorf("start: %v", err)
			}
		})
	}
	wg.Wait()
	note("%d macvlan containers on one parent after %v", containers, time.Since(start).Round(100*time.Millisecond))
	var boxes []struct {
		Config          struct{ Hostname string }
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress, MacAddress string }
		}
	}
	if err := json.Unmarshal([]byte(e.must(t, append([]string{"inspect"}, names...)...)), &boxes); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, b := range boxes {
		for _, x := range b.NetworkSettings.Networks {
			if seen[x.IPAddress] || seen[x.MacAddress] {
				t.Errorf("%s or %s is there twice", x.IPAddress, x.MacAddress)
			}
			seen[x.IPAddress], seen[x.MacAddress] = true, true
			out, err := output(e.lan.client.inNet(suite.probe, "dial", "-timeout", "1500ms", "-wait", "3s", "tcp", x.IPAddress+":80"))
			if err != nil || !strings.Contains(out, fmt.Sprintf("%q", b.Config.Hostname)) {
				t.Errorf("%s of %s: %s %v", x.IPAddress, b.Config.Hostname, strings.TrimSpace(out), err)
			}
		}
	}
	if len(seen) != 2*containers {
		t.Errorf("%d addresses of both kinds, want %d", len(seen), 2*containers)
	}
	start = time.Now()
	e.removeAll(t)
	note("%d macvlan containers removed after %v", containers, time.Since(start).Round(100*time.Millisecond))
	e.checkClean(t)
}
