package driver

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

// bindings is what the engine sends for -p HOST:PORT/udp with ranges: an entry
// for each port.
func bindings(hostIP string, host, port uint16, n int) []string {
	list := make([]string, n)
	for i := range uint16(n) {
		list[i] = binding(17, port+i, hostIP, host+i, host+i)
	}
	return list
}

// The ports that Asterisk asks for: one record, one held range and one element for
// each address, whatever the number of ports, and after a restart too.
func TestRangeOfPorts(t *testing.T) {
	r := newPortsRig(t, "")
	call := program(net1, ep1, bindings("", 10000, 10000, 10001)...)
	r.must("Join", strings.Replace(call, `"Options"`, `"SandboxKey":"/var/run/docker/netns/0123456789ab","Options"`, 1))
	r.must("ProgramExternalConnectivity", call)
	want := []string{"udp 0.0.0.0:10000-20000 to 10.1.0.2:10000-20000", "udp [::]:10000-20000 to 10.1.0.2:10000-20000"}
	r.wantListening(want...)
	if text := r.kernel.text(); strings.Count(text, "published") != 1 || !strings.Contains(text, "published { 0.0.0.0/0 . udp . 10000-20000 : 10.1.0.2 }") {
		t.Errorf("not one element:\n%s", text)
	}
	rec, err := r.eps.Get(t.Context(), endpointKey(net1, ep1))
	if err != nil || len(rec.Value) > 1000 {
		t.Errorf("the record has %d bytes, %v", len(rec.Value), err)
	}
	r.must("ProgramExternalConnectivity", call)
	r.wantListening(want...)
	r.restart()
	r.wantListening(want...)
	r.must("ProgramExternalConnectivity", call)
	r.idle()

	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	r.refused("ProgramExternalConnectivity", program(net1, ep2, bindings("", 12000, 12000, 2)...), "ports 12000-12001/udp", "in use")
	r.must("RevokeExternalConnectivity", ids(net1, ep1))
	r.wantListening()
	if strings.Contains(r.kernel.text(), "published") {
		t.Errorf("left:\n%s", r.kernel.text())
	}
}

// A range to other numbers is one record and one held range; in the kernel each
// port is an element.
func TestRangeToOtherNumbers(t *testing.T) {
	r := newPortsRig(t, "")
	r.must("ProgramExternalConnectivity", program(net1, ep1, bindings("0.0.0.0", 20000, 10000, 100)...))
	r.wantListening("udp 0.0.0.0:20000-20099 to 10.1.0.2:10000-10099")
	if text := r.kernel.text(); strings.Count(text, "published") != 100 || !strings.Contains(text, "udp . 20099 : 10.1.0.2 . 10099") {
		t.Errorf("not 100 elements:\n%s", text)
	}
	r.idle()
}

// Without translation the host's numbers do not matter.
func TestRangeRouted(t *testing.T) {
	r := newPortsRig(t, `{"com.docker.network.bridge.gateway_mode_ipv4":"routed","com.docker.network.bridge.trusted_host_interfaces":"lo"}`)
	var list []string
	for i := range uint16(50) {
		list = append(list, binding(17, 10000+i, "", 0, 0))
	}
	r.must("ProgramExternalConnectivity", program(net1, ep1, list...))
	r.wantListening()
	for _, want := range []string{"exposed { 10.1.0.2/32 . udp . 10000-10049 }", "trusted { lo . 10.1.0.2/32 . udp . 10000-10049 }"} {
		if !strings.Contains(r.kernel.text(), want) {
			t.Errorf("no %q in\n%s", want, r.kernel.text())
		}
	}
	r.idle()
}

// A record of a version that knew no ranges keeps its form while the container
// runs, and the ports stay held.
func TestRangeInAnOldRecord(t *testing.T) {
	r := newPortsRig(t, "")
	r.must("ProgramExternalConnectivity", program(net1, ep1, bindings("0.0.0.0", 20000, 20000, 3)...))
	key := endpointKey(net1, ep1)
	found, err := r.eps.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := decodeEndpoint(key, found.Value)
	if err != nil {
		t.Fatal(err)
	}
	p := rec.Ports[0]
	rec.Ports = nil
	for range 3 {
		one := p
		one.More = 0
		rec.Ports = append(rec.Ports, one)
		p.Host, p.Container = next(p.Host), next(p.Container)
	}
	if found.Value, err = json.Marshal(rec); err != nil || strings.Contains(string(found.Value), "More") {
		t.Fatalf("%s, %v", found.Value, err)
	}
	if _, err := r.eps.Put(t.Context(), found); err != nil {
		t.Fatal(err)
	}
	r.restart()
	want := []string{"udp 0.0.0.0:20000 to 10.1.0.2:20000", "udp 0.0.0.0:20001 to 10.1.0.2:20001", "udp 0.0.0.0:20002 to 10.1.0.2:20002"}
	r.wantListening(want...)
	r.must("ProgramExternalConnectivity", program(net1, ep1, bindings("0.0.0.0", 20000, 20000, 3)...))
	r.wantListening(want...)
	r.idle()
}

func TestTooManyPorts(t *testing.T) {
	r := newPortsRig(t, "")
	r.refused("ProgramExternalConnectivity", program(net1, ep1, bindings("", 10000, 10000, 33000)...), "publish 33000 ports", "at most 32768")
	var list []string
	for i := range uint16(3000) {
		list = append(list, binding(17, 10000+i, "", 0, 0))
	}
	r.refused("ProgramExternalConnectivity", program(net1, ep1, list...), "publish 3000 ports", "only as a range with host ports", "-p 10000-20000:10000-20000/udp")
	r.wantListening()
	r.idle()
}

func next(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr(), a.Port()+1) }

// In gateway mode routed the published ports are open at the container's own
// address, also where another of its networks is its way out.
func TestRoutedPortsWithoutTheWayOut(t *testing.T) {
	r := newPortsRig(t, `{"com.docker.network.bridge.gateway_mode_ipv4":"routed"}`)
	body := strings.Replace(program(net1, ep1, binding(6, 80, "", 8080, 8080)), `"Options"`, `"SandboxKey":"/var/run/docker/netns/0123456789ab","Options"`, 1)
	open := func(want bool) {
		t.Helper()
		if got := strings.Contains(r.kernel.text(), "exposed { 10.1.0.2/32 . tcp . 80 }"); got != want {
			t.Errorf("port open: %t, want %t\n%s", got, want, r.kernel.text())
		}
	}
	for range 2 { // the engine may repeat it
		r.must("Join", body)
		open(true)
		r.idle()
	}
	r.restart()
	open(true)
	r.must("ProgramExternalConnectivity", body) // now it is
	r.must("RevokeExternalConnectivity", ids(net1, ep1))
	open(true)
	r.idle()
	r.must("Leave", ids(net1, ep1))
	open(false)
	r.idle()
}
