//go:build e2e

package e2e

import (
	"strings"
	"testing"
)

// shareSubnet has two networks on one LAN with its subnet, each with a range of its
// own: nothing is given twice, all reach each other, and either may go.
func shareSubnet(t *testing.T, e *engine) {
	t.Helper()
	const first4, second4, secondRange = "198.51.100.160", "198.51.100.192", "198.51.100.192/27"
	e.oursNetwork(t, "first", lan4Args("-o", "mode=macvlan", "-o", "probe=false")...)
	e.oursNetwork(t, "second", "--subnet", lan4, "--ip-range", secondRange, "--gateway", client4, "-o", "mode=macvlan", "-o", "parent=lan0", "-o", "probe=false")
	out, err := e.weft(t, "status", "pools")
	if want := "2 networks share pool " + lan4 + ", each with a range of its own: " + lan4Range + ", " + secondRange; err != nil || !strings.Contains(out, want) {
		t.Errorf("status does not say that they share it, %v:\n%s", err, out)
	}
	e.run(t, "alpha", "--network", "first")
	e.run(t, "beta", "--network", "second")
	e.sees(t, e.lan.client, first4+":80", "alpha")
	e.sees(t, e.lan.client, second4+":80", "beta")
	if got := (box{e: e, name: "alpha"}).asks(second4 + ":80"); got != first4 {
		t.Errorf("from one network to the other: %s", got)
	}
	refused := func(network, addr string) {
		t.Helper()
		err := e.tryRun("refused", "--network", network, "--ip", addr)
		_, _ = e.docker("rm", "-f", "refused")
		if err == nil || !strings.Contains(lastLine(err), addr+" of pool "+lan4+" is in use") {
			t.Errorf("--ip %s on network %s: %v", addr, network, err)
		}
	}
	refused("first", second4)
	refused("second", client4)
	e.killPlugin(t)
	e.waitPlugin(t)
	refused("second", first4)
	e.must(t, "rm", "-f", "alpha")
	e.must(t, "network", "rm", "first")
	refused("second", client4)
	e.must(t, "restart", "-t", "0", "beta")
	e.sees(t, e.lan.client, second4+":80", "beta")
	// The range is free again, with another one's options.
	e.oursNetwork(t, "third", lan4Args("-o", "mode=macvlan", "-o", "host_access=true")...)
	e.run(t, "gamma", "--network", "third")
	e.sees(t, e.lan.client, first4+":80", "gamma")
	e.removeAll(t)
	e.checkClean(t)
}
