//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// onMacvlan is a network on the card.
var onMacvlan = []string{"-o", "mode=macvlan", "-o", "parent=lan0"}

// TestLease takes addresses from the LAN's DHCP server, in each way that a
// network can have them.
func TestLease(t *testing.T) {
	t.Parallel()
	e := newLANWorld(t).e
	for _, x := range []struct {
		name string
		run  func(t *testing.T, e *engine)
	}{
		{"the host is on the LAN", leaseOnHostsLAN},
		{"the host has no address there", leaseElsewhere},
		{"a wanted address", leaseWanted},
		{"two networks", leaseTwice},
		{"internal", leaseInternal},
		{"both families", leaseBoth},
		{"a station has the address", leaseSquatted},
		{"Docker's own macvlan", leaseForeign},
		{"no server at first", leaseLater},
		{"bridge", leaseBridge}, // last: it rebuilds the host's network
	} {
		t.Run(x.name, func(t *testing.T) {
			x.run(t, e)
			e.removeAll(t)
			e.checkClean(t)
		})
	}
}

// leased starts a container and checks that docker, the server and the LAN
// agree on its address and MAC.
func (e *engine) leased(t *testing.T, s *dnsmasq, name, network string, args ...string) place {
	t.Helper()
	e.run(t, name, append([]string{"--network", network}, args...)...)
	p := e.placeOf(t, name, network)
	if mac := s.leases(t)[p.IPAddress]; mac != p.MacAddress {
		t.Errorf("%s has %s with MAC %s, which the server has leased to %q", name, p.IPAddress, p.MacAddress, mac)
	}
	e.sees(t, e.lan.client, p.IPAddress+":80", name)
	return p
}

func leaseOnHostsLAN(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "-o", "host_access=true")...)
	s.has(t) // asking which subnet there is takes nothing
	p := e.leased(t, s, "alpha", "lan", "-p", "8080:80")
	if !strings.HasPrefix(p.IPAddress, "198.51.100.") || p.Gateway != client4 {
		t.Errorf("%+v", p)
	}
	e.sees(t, e.machine, p.IPAddress+":80", "alpha")
	e.sees(t, e.lan.client, host4+":8080", "alpha")
	// The same again, and meanwhile another one.
	e.must(t, "stop", "-t", "0", "alpha")
	s.has(t)
	e.must(t, "start", "alpha")
	if again := e.placeOf(t, "alpha", "lan"); again != p {
		t.Errorf("started again: %+v, before %+v", again, p)
	}
	other := e.leased(t, s, "beta", "lan")
	s.has(t, p.IPAddress, other.IPAddress)
	e.must(t, "rm", "-f", "alpha", "beta")
	s.has(t)
}

func leaseElsewhere(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHome(t)
	s.stop()
	s.args = append(s.args, "--dhcp-option=26,1400", "--dhcp-option=121,10.80.0.0/12,192.168.178.2,203.0.113.0/25,192.168.178.2,0.0.0.0/0,"+home4)
	s.start(t)
	e.leaseNetwork(t, "lan", "lan0", onMacvlan...)
	if have := e.must(t, "network", "inspect", "-f", "{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}}{{end}}", "lan"); have != homeNet+" "+home4+"/24" && have != homeNet+" "+home4 {
		t.Errorf("the engine knows the network as %q", have)
	}
	if p := e.leased(t, s, "alpha", "lan"); !strings.HasPrefix(p.IPAddress, "192.168.178.") || p.Gateway != home4 {
		t.Errorf("%+v", p)
	}
	// The server's routes and MTU are the container's, and keep it off no network.
	e.must(t, "network", "create", "-d", ours, "--subnet", "203.0.113.0/24", "inner")
	e.must(t, "rm", "-f", "alpha")
	e.run(t, "alpha", "--network", "inner")
	e.must(t, "network", "connect", "--driver-opt", "hostname=door", "--driver-opt", "client_id=0x0a0b0c", "lan", "alpha")
	said := ""
	for _, args := range [][]string{{"/bin/ip", "route"}, {"/bin/ip", "link"}} {
		c, err := e.in("alpha", args...)
		if err != nil {
			t.Fatal(err)
		}
		out, err := output(c)
		if err != nil {
			t.Error(err)
		}
		said += out
	}
	if !strings.Contains(said, "10.80.0.0/12 via 192.168.178.2 ") || !strings.Contains(said, "mtu 1400 ") || strings.Contains(said, "203.0.113.0/25") {
		t.Errorf("in the container:\n%s", said)
	}
	if log := s.log(t); !strings.Contains(log, "client provides name: door") {
		t.Error("the endpoint's options did not reach the server")
	}
	s.has(t, e.placeOf(t, "alpha", "lan").IPAddress)
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
	e.must(t, "network", "rm", "inner")
}

func leaseWanted(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	_, err := e.docker("network", "create", "-d", ours, "--ipam-driver", ours, "--ipam-opt", "dhcp=lan0", "--subnet", "198.51.100.0/25", "lan")
	if text := lastLine(err); !strings.Contains(text, "198.51.100.0/24, not of 198.51.100.0/25") {
		t.Errorf("another subnet than the server's: %q", text)
	}
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "--subnet", lan4)...)
	const want = "198.51.100.185"
	if p := e.leased(t, s, "alpha", "lan", "--ip", want); p.IPAddress != want {
		t.Errorf("--ip %s: the container has %s", want, p.IPAddress)
	}
	e.refusedAddress(t, "--ip", want, "is that of another container of this host")
	e.refusedAddress(t, "--ip", "198.51.100.150", "refused") // out of the server's range
	s.has(t, want)
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
}

// leaseTwice has two networks on one LAN, as no other IPAM could.
func leaseTwice(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "-o", "host_access=true")...)
	e.leaseNetwork(t, "lan2", "lan0", onMacvlan...)
	a, b := e.leased(t, s, "alpha", "lan"), e.leased(t, s, "beta", "lan2")
	s.has(t, a.IPAddress, b.IPAddress)
	e.sees(t, e.machine, a.IPAddress+":80", "alpha")
	// One of them goes, with its leases; the other stays.
	e.must(t, "rm", "-f", "beta")
	e.must(t, "network", "rm", "lan2")
	s.has(t, a.IPAddress)
	e.sees(t, e.machine, a.IPAddress+":80", "alpha")
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
}

// leaseBoth has a second server for IPv6, which names no router: no gateway is
// made up, and the engines that want one are told that there is none.
func leaseBoth(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	s.stop()
	s.args = append(s.args, "--dhcp-range=2001:db8:1::600,2001:db8:1::6ff,64,2m")
	s.start(t)
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "--ipv6", "--subnet", "2001:db8:1::/64")...)
	e.run(t, "alpha", "--network", "lan")
	f := strings.Fields(e.must(t, "inspect", "-f", "{{with .NetworkSettings.Networks.lan}}{{.IPAddress}} {{.GlobalIPv6Address}} {{.Gateway}} {{.IPv6Gateway}}{{end}}", "alpha"))
	if len(f) != 3 || !strings.HasPrefix(f[1], "2001:db8:1::6") || f[2] != client4 {
		t.Errorf("it has %q, want an address of each family and the IPv4 gateway", f)
	}
	e.sees(t, e.lan.client, f[0]+":80", "alpha")
	e.sees(t, e.lan.client, "["+f[1]+"]:80", "alpha")
}

func leaseInternal(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "--internal")...)
	p := e.leased(t, s, "alpha", "lan")
	c, err := e.in("alpha", "/bin/ip", "route")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := output(c); err != nil || strings.Contains(out, "default") || !strings.Contains(out, lan4) {
		t.Errorf("routes of %+v: %s %v", p, out, err)
	}
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
}

// leaseSquatted has a station take the address that the server is about to
// lease again.
func leaseSquatted(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	e.leaseNetwork(t, "lan", "lan0", onMacvlan...)
	p := e.leased(t, s, "alpha", "lan")
	e.must(t, "rm", "-f", "alpha")
	e.lan.station(t, "squatter", p.IPAddress+"/24")
	// What the LAN was asked a moment ago counts for 15 s.
	e.killPlugin(t)
	e.waitPlugin(t)
	time.Sleep(time.Second) // the engine registers it again
	other := e.leased(t, s, "beta", "lan")
	if other.IPAddress == p.IPAddress {
		t.Errorf("%s is a station's, and was given to a container", p.IPAddress)
	}
	if log := s.log(t); !strings.Contains(log, "DHCPDECLINE(lan0) "+p.IPAddress) {
		t.Errorf("the server was not told that %s is in use:\n%s", p.IPAddress, log)
	}
	e.must(t, "rm", "-f", "beta")
	s.has(t)
}

// leaseForeign has the addresses alone of us. The MAC address that the server
// knows is not the container's there: Docker's driver chooses that.
func leaseForeign(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	e.must(t, "network", "create", "-d", "macvlan", "-o", "parent=lan0", "--ipam-driver", ours, "--ipam-opt", "dhcp=lan0", "--subnet", lan4, "theirs")
	e.run(t, "alpha", "--network", "theirs")
	p := e.placeOf(t, "alpha", "theirs")
	mac := s.leases(t)[p.IPAddress]
	if mac == "" || mac == p.MacAddress {
		t.Errorf("the container has %+v, the server knows %q", p, mac)
	}
	e.lan.client.net(t, "ip", "neigh", "flush", "all") // nobody announces it
	e.sees(t, e.lan.client, p.IPAddress+":80", "alpha")
	e.must(t, "restart", "-t", "0", "alpha")
	if again := e.placeOf(t, "alpha", "theirs"); again.IPAddress != p.IPAddress {
		t.Errorf("started again: %s, before %s", again.IPAddress, p.IPAddress)
	}
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
	e.must(t, "network", "rm", "theirs")
}

// leaseLater has a router that is switched on after the network was made.
func leaseLater(t *testing.T, e *engine) {
	t.Helper()
	s := e.lan.dhcpHost(t)
	s.stop()
	e.leaseNetwork(t, "lan", "lan0", append(onMacvlan, "--subnet", lan4, "--gateway", client4)...)
	if err := e.tryRun("alpha", "--network", "lan"); !strings.Contains(lastLine(err), "no DHCP server answered on lan0") {
		t.Errorf("no server: %v", err)
	}
	s.start(t)
	e.must(t, "start", "alpha")
	p := e.placeOf(t, "alpha", "lan")
	s.has(t, p.IPAddress)
	e.sees(t, e.lan.client, p.IPAddress+":80", "alpha")
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
}

// leaseBridge has containers on a bridge of the host.
func leaseBridge(t *testing.T, e *engine) {
	t.Helper()
	e.bridgeLAN(t)
	s := e.lan.dhcpHost(t)
	e.leaseNetwork(t, "lan", "br0", "-o", "mode=bridge", "-o", "bridge=br0")
	p := e.leased(t, s, "alpha", "lan")
	if p.Gateway != client4 {
		t.Errorf("%+v", p)
	}
	e.sees(t, e.machine, p.IPAddress+":80", "alpha")
	e.must(t, "rm", "-f", "alpha")
	s.has(t)
}

// TestLeaseKinds asks for leases by links that not every kernel has.
func TestLeaseKinds(t *testing.T) {
	t.Parallel()
	e := newLANWorld(t).e
	t.Run("VLAN", func(t *testing.T) {
		needKind(t, e.machine, "vlan")
		w := newWorld(t, e, ours)
		w.joinVLAN()
		s := e.lan.dhcp(t, "lan0.10", vlanClient, "203.0.113.160", "203.0.113.190")
		// The sub-interface is made after the pool: there is nobody to ask yet.
		_, err := e.docker("network", "create", "-d", ours, "--ipam-driver", ours, "--ipam-opt", "dhcp=lan0.10", "-o", "mode=macvlan", "-o", "parent=lan0.10", "lan")
		if text := lastLine(err); !strings.Contains(text, "lan0.10") {
			t.Errorf("no subnet: %q", text)
		}
		e.leaseNetwork(t, "lan", "lan0.10", "-o", "mode=macvlan", "-o", "parent=lan0.10", "--subnet", vlanNet, "--gateway", vlanClient)
		p := e.leased(t, s, "alpha", "lan")
		e.must(t, "restart", "-t", "0", "alpha")
		if again := e.placeOf(t, "alpha", "lan"); again != p {
			t.Errorf("started again: %+v, before %+v", again, p)
		}
		e.removeAll(t)
		s.has(t)
		e.checkClean(t)
	})
	t.Run("ipvlan", func(t *testing.T) {
		needKind(t, e.machine, "ipvlan")
		s := e.lan.dhcpHost(t)
		e.leaseNetwork(t, "lan", "lan0", "-o", "mode=ipvlan", "-o", "parent=lan0", "-o", "host_access=true")
		e.run(t, "alpha", "--network", "lan")
		e.run(t, "beta", "--network", "lan")
		a, b := e.address(t, "alpha", "lan"), e.address(t, "beta", "lan")
		s.has(t, a, b)
		// All containers have the card's MAC; the server tells them apart by
		// their identifiers.
		e.sees(t, e.lan.client, a+":80", "alpha")
		e.sees(t, e.lan.client, b+":80", "beta")
		e.sees(t, e.machine, a+":80", "alpha")
		e.removeAll(t)
		s.has(t)
		e.checkClean(t)
	})
}

// address is a container's on a network.
func (e *engine) address(tb testing.TB, container, network string) string {
	tb.Helper()
	return e.must(tb, "inspect", "-f", fmt.Sprintf("{{with index .NetworkSettings.Networks %q}}{{.IPAddress}}{{end}}", network), container)
}
