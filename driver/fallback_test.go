package driver

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

const ep6 = "e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6"

// newTwoFamiliesRig is a container as engine 29 starts it with --network net4
// --network net6 -p 8080:80, up to the second network: that has only IPv6.
func newTwoFamiliesRig(t *testing.T) *rig {
	t.Helper()
	r := newPortsRig(t, "")
	r.must("CreateNetwork", `{"NetworkID":"`+net2+`","Options":{"com.docker.network.enable_ipv4":false,"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{}},`+
		`"IPv4Data":[],"IPv6Data":[{"AddressSpace":"local","Pool":"fd00:2::/64","Gateway":"fd00:2::1/64","AuxAddresses":{}}]}`)
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80")
	return r
}

func (r *rig) joinSixth(sandbox string) {
	r.t.Helper()
	r.must("CreateEndpoint", createEndpoint(net2, ep6, "", "fd00:2::2/64"))
	r.must("Join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":%q,"Options":{"com.docker.network.portmap":[%s]}}`,
		net2, ep6, sandbox, binding(6, 80, "", 8080, 8080)))
	r.kernel.moveIn(hostEnd(ep6))
}

const sandboxKey = "/var/run/docker/netns/0123456789ab"

// Engine 29 does not call for the first endpoint again when another one becomes the
// way out for IPv6: that takes the ports over, and they come back with its end.
func TestFallbackIsTakenOver(t *testing.T) {
	two := []string{"tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to [fd00:2::2]:80"}
	one := []string{"tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80"}
	call := program(net2, ep6, binding(6, 80, "", 8080, 8080))
	for _, end := range []string{"Revoke", "Leave", "Delete", "restarts"} {
		t.Run(end, func(t *testing.T) {
			r := newTwoFamiliesRig(t)
			r.joinSixth(sandboxKey)
			r.must("ProgramExternalConnectivity", call)
			r.wantListening(two...)
			r.idle()
			r.must("ProgramExternalConnectivity", call)
			r.wantListening(two...)
			r.refused("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080), binding(6, 99, "256.0.0.1", 9000, 9000)), "256.0.0.1")
			r.wantListening(two...)
			switch end {
			case "restarts": // then engine 29 sends no Revoke
				r.restart()
				r.wantListening(two...)
				r.idle()
				r.must("ProgramExternalConnectivity", call)
				r.wantListening(two...)
				r.must("Leave", ids(net2, ep6))
			case "Revoke":
				r.must("RevokeExternalConnectivity", ids(net2, ep6))
			case "Leave":
				r.must("Leave", ids(net2, ep6))
			case "Delete":
				r.must("DeleteEndpoint", ids(net2, ep6))
			}
			r.wantListening(one...)
			r.idle()
			r.restart()
			r.wantListening(one...)
			r.idle()
			r.must("Leave", ids(net1, ep1))
			r.wantListening()
			r.must("DeleteEndpoint", ids(net1, ep1))
			r.idle()
		})
	}
}

// With the network of the endpoint that took the ports they come back too.
func TestFallbackAfterTheNetwork(t *testing.T) {
	r := newTwoFamiliesRig(t)
	r.joinSixth(sandboxKey)
	r.must("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080)))
	r.must("DeleteNetwork", `{"NetworkID":"`+net2+`"}`)
	if _, err := r.d.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80")
	r.idle()
}

// Engine 28 calls for the first endpoint again, and says that IPv6 is not its.
func TestFallbackIsWithdrawn(t *testing.T) {
	r := newTwoFamiliesRig(t)
	r.must("ProgramExternalConnectivity", strings.Replace(program(net1, ep1, binding(6, 80, "", 8080, 8080)), `"Options":{`, `"Options":{"`+optionNoProxy6To4+`":true,`, 1))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80")
	r.joinSixth(sandboxKey)
	r.must("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080)))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to [fd00:2::2]:80")
	r.must("RevokeExternalConnectivity", ids(net2, ep6))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80")
	r.idle()
}

// What another container has is not taken over; and what was let go for a call that
// failed comes back.
func TestFallbackOfAnotherContainer(t *testing.T) {
	r := newTwoFamiliesRig(t)
	r.joinSixth("/var/run/docker/netns/ba9876543210")
	r.refused("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080)), "port 80/tcp", "in use")
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80")

	r = newTwoFamiliesRig(t)
	r.joinSixth(sandboxKey)
	r.kernel.taken[netip.MustParseAddrPort("[::]:9000")] = true
	r.refused("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080), binding(6, 90, "::", 9000, 9000)), "port 90/tcp", "in use")
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80")
	r.idle()
}
