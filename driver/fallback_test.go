package driver

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/datapath"
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

// withoutIPv6 is a call that says that another endpoint is the way out for IPv6.
func withoutIPv6(call string) string {
	return strings.Replace(call, `"Options":{`, `"Options":{"`+optionNoProxy6To4+`":true,`, 1)
}

// proxiedPorts are what internal networks are kept from.
func (r *rig) proxiedPorts() (n int) { return strings.Count(r.kernel.text(), " proxied { ") }

// What only the proxy serves is said to the firewall, and only while it is so.
func TestFallbackIsClosedToInternalNetworks(t *testing.T) {
	r := newTwoFamiliesRig(t)
	if text := r.kernel.text(); !strings.Contains(text, "proxied { ::/0 . tcp . 8080 }") || r.proxiedPorts() != 1 {
		t.Errorf("not closed:\n%s", text)
	}
	r.joinSixth(sandboxKey)
	r.must("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080)))
	if r.proxiedPorts() != 0 {
		t.Errorf("closed although it is translated:\n%s", r.kernel.text())
	}
	r.must("Leave", ids(net2, ep6))
	if r.proxiedPorts() != 1 {
		t.Errorf("not closed again:\n%s", r.kernel.text())
	}
	r.idle()
	r.must("RevokeExternalConnectivity", ids(net1, ep1))
	if r.proxiedPorts() != 0 {
		t.Errorf("left behind:\n%s", r.kernel.text())
	}
	one := PublishedPort{Proto: datapath.TCP, Host: netip.MustParseAddrPort("[fd00::1]:80"), Container: netip.MustParseAddrPort("10.1.0.2:8080")}
	if e := published([]PublishedPort{one}, nil).Elements; len(e) != 1 || e[0].Net != netip.MustParsePrefix("fd00::1/128") {
		t.Errorf("one address: %v", e)
	}
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
	r.must("ProgramExternalConnectivity", withoutIPv6(program(net1, ep1, binding(6, 80, "", 8080, 8080))))
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

// An endpoint with both families leaves the host's IPv6 ports to another one that
// becomes the way out for IPv6, as engine 29 tells it, and has them again after.
func TestOwnIPv6PortsAreLeft(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createDual(""))
	r.must("CreateNetwork", `{"NetworkID":"`+net2+`","Options":{"com.docker.network.enable_ipv4":false,"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{}},`+
		`"IPv4Data":[],"IPv6Data":[{"AddressSpace":"local","Pool":"fd00:2::/64","Gateway":"fd00:2::1/64","AuxAddresses":{}}]}`)
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
	r.must("Join", joinBody(net1, ep1))
	r.kernel.moveIn(veth1)
	port := binding(6, 80, "", 8080, 8080)
	r.must("ProgramExternalConnectivity", program(net1, ep1, port))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to [fd00:1::2]:80")
	r.joinSixth(sandboxKey)
	r.must("ProgramExternalConnectivity", withoutIPv6(program(net1, ep1, port)))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80")
	r.must("ProgramExternalConnectivity", withoutIPv6(program(net2, ep6, port))) // with the option as engine 28 calls
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to [fd00:2::2]:80")
	r.idle()
	r.must("RevokeExternalConnectivity", ids(net2, ep6))
	r.must("Leave", ids(net2, ep6))
	r.must("ProgramExternalConnectivity", program(net1, ep1, port))
	r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to [fd00:1::2]:80")
}

// A taking and a giving back that come together end in what was decided last, in
// whatever order they get the endpoint.
func TestFallbackTakenWhileGivenBack(t *testing.T) {
	start := func(t *testing.T) (r *rig, e *endpoint, f *fallback) {
		t.Helper()
		r = newTwoFamiliesRig(t)
		r.joinSixth(sandboxKey)
		r.d.mu.Lock()
		defer r.d.mu.Unlock()
		return r, r.d.networks[net1].endpoints[ep1], r.d.fallbacks[sandboxKey]
	}
	until := func(t *testing.T, r *rig, f *fallback, taker string) {
		t.Helper()
		for range 10000 {
			r.d.mu.Lock()
			done := f.taker == taker
			r.d.mu.Unlock()
			if done {
				return
			}
			time.Sleep(time.Millisecond)
		}
		t.Fatalf("taker is not %q", taker)
	}
	decide := func(r *rig, f *fallback, taker string) {
		r.d.mu.Lock()
		defer r.d.mu.Unlock()
		f.taker, f.e.yields = taker, taker != ""
	}
	t.Run("given back", func(t *testing.T) {
		r, e, f := start(t)
		r.must("ProgramExternalConnectivity", program(net2, ep6, binding(6, 80, "", 8080, 8080)))
		e.mu.Lock()
		done := make(chan error, 1)
		go func() {
			_, err := r.call("RevokeExternalConnectivity", ids(net2, ep6))
			done <- err
		}()
		until(t, r, f, "")
		decide(r, f, ep6)
		e.mu.Unlock()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80")
		if !e.yields {
			t.Error("the fallback ports are another's, and wanted")
		}
	})
	t.Run("taken", func(t *testing.T) {
		r, e, f := start(t)
		e.mu.Lock()
		done := make(chan error, 1)
		go func() {
			_, err := r.d.takeOver(t.Context(), net2, ep6)
			done <- err
		}()
		until(t, r, f, ep6)
		decide(r, f, "")
		e.mu.Unlock()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		r.wantListening("tcp 0.0.0.0:8080 to 10.1.0.2:80", "tcp [::]:8080 to 10.1.0.2:80")
		if e.yields {
			t.Error("the fallback ports are nobody's")
		}
	})
}
