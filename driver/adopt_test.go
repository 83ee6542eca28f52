package driver

import (
	"net/netip"
	"strings"
	"testing"
)

// TestBridgeNameOfAnother: an existing bridge is the same by either option: nothing
// of its LAN is masqueraded, and the gateway is the LAN's router.
func TestBridgeNameOfAnother(t *testing.T) {
	for _, more := range []string{"", `,"com.docker.network.bridge.enable_ip_masquerade":"true"`, `,"com.docker.network.bridge.enable_ip_masquerade":"false"`} {
		var seen []string
		for _, name := range []string{"bridge", "com.docker.network.bridge.name"} {
			r := newRig(t)
			r.host.bridge("br0", "10.1.0.2/24")
			r.host.routers["br0"] = append(r.host.routers["br0"], netip.MustParseAddr("10.1.0.254"))
			options := `{"` + name + `":"br0"` + more + `}`
			asked := r.must("GwAllocCheck", `{"Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.generic":`+options+`}}`)
			body := createNetwork(net1, "10.1.0.0/24", options)
			r.must("CreateNetwork", body)
			r.must("CreateNetwork", body) // as a swarm's node does after a crash
			r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.5/24", ""))
			answer := r.must("Join", joinBody(net1, ep1))
			r.kernel.moveIn(veth1)
			if got := strings.Contains(r.kernel.text(), "masquerade"); got != strings.Contains(more, "true") {
				t.Errorf("%s: masquerades: %t", options, got)
			}
			r.idle()
			seen = append(seen, asked+"\n"+answer+"\n"+r.kernel.text())
		}
		if seen[0] != seen[1] {
			t.Errorf("%s: bridge=br0 makes\n%s\nbridge.name=br0 makes\n%s", more, seen[0], seen[1])
		}
	}
}
