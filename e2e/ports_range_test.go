//go:build e2e

package e2e

import (
	"strings"
	"testing"
	"time"
)

// manyPorts publishes what Asterisk and FreePBX do: ten thousand UDP ports.
func manyPorts(t *testing.T, e *engine) {
	t.Helper()
	e.oursNetwork(t, "many", "--subnet", "10.209.0.0/24")
	plain := time.Now()
	e.run(t, "few", "--network", "many", "-p", "9999:9999/udp")
	few := time.Since(plain)
	start := time.Now()
	e.run(t, "pbx", "--network", "many", "--ip", "10.209.0.20", "-p", "10000-20000:10000-20000/udp")
	took := time.Since(start)
	note("a container with 10,001 UDP ports: %v, with one: %v", took.Round(10*time.Millisecond), few.Round(10*time.Millisecond))
	// The engine itself needs time for each port, in all versions.
	if took > few+5*time.Second*suite.slow {
		t.Errorf("10,001 ports took %v, one port %v", took, few)
	}
	if err := e.tryRun("second", "--network", "many", "-p", "12345:12345/udp"); err == nil || !strings.Contains(err.Error(), "12345/udp on 0.0.0.0 is already published for 10.209.0.20:12345") {
		t.Errorf("a port out of the range was given again: %v", err)
	}
	e.must(t, "rm", "-f", "second")
	s, err := e.status(t)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, ep := range s.Endpoints {
		for _, p := range ep.Ports {
			found = found || p.Host == "0.0.0.0:10000" && p.Container == "10.209.0.20:10000" && p.More == 10000
		}
	}
	if !found {
		t.Errorf("status does not show the range: %+v", s.Endpoints)
	}
	stop := time.Now()
	e.must(t, "rm", "-f", "few", "pbx")
	note("both removed in %v", time.Since(stop).Round(10*time.Millisecond))
	e.must(t, "network", "rm", "many")
}
