//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// refusal is a network that must not be made, and what the error has to say.
type refusal struct {
	args  string
	words []string
}

// refusals need parents that TestLANParent makes.
var refusals = []refusal{
	{"-o mode=macvlan -o parent=nope0", []string{"nope0", "does not exist", "ip link"}},
	{"-o mode=macvlan -o parent=lan0.5000", []string{"lan0.5000", "VLAN ID", "4094"}},
	{"-o mode=macvlan -o parent=lan0.10.20.30", []string{"lan0.10.20.30", "two VLAN tags"}},
	{"-o mode=macvlan -o parent=port0", []string{"port0", "br9", "parent=br9", "bridge=br9"}},
	{"-o mode=ipvlan -o parent=port0", []string{"port0", "br9", "parent=br9", "bridge=br9"}},
	{"-o mode=macvlan -o parent=down0.5", []string{"down0", "is down", "ip link set down0 up"}},
	{"-o mode=macvlan -o parent=lo", []string{"lo", "loopback"}},
	{"-o mode=macvlan -o parent=wfbours", []string{"wfbours", "of this plugin"}},
	{"-o mode=macvlan -o parent=a-name-that-is-too-long", []string{"parent", "15"}},
	{"-o mode=macvlan -o parent=lan0 -o macvlan_mode=brigde", []string{"macvlan_mode", "brigde", "bridge", "private", "vepa", "passthru"}},
	{"-o mode=macvlan -o parent=lan0 -o ipvlan_mode=l2", []string{"ipvlan_mode", "macvlan", "macvlan_mode"}},
	{"-o mode=ipvlan -o parent=lan0 -o macvlan_mode=bridge", []string{"macvlan_mode", "ipvlan", "ipvlan_mode"}},
	{"-o mode=ipvlan -o parent=lan0 -o ipvlan_mode=l4", []string{"ipvlan_mode", "l4", "l2", "l3", "l3s"}},
	{"-o mode=ipvlan -o parent=lan0 -o ipvlan_flag=hairpin", []string{"ipvlan_flag", "hairpin", "bridge", "private", "vepa"}},
	{"-o parent=lan0", []string{"option parent belongs to mode macvlan, ipvlan: add -o mode=macvlan"}},
	{"-o mode=macvlan -o parnet=lan0", []string{"parnet", `"parent"`}},
	{"-o mode=macvlan -o parent=lan0 -o macvlan_mode=private -o host_access=true --subnet 198.51.100.0/24", []string{"host_access", "macvlan_mode=private", "macvlan_mode=bridge"}},
	{"-o mode=macvlan -o parent=lan0 -o host_access=perhaps", []string{"host_access", "perhaps", "true or false"}},
	{"-o mode=macvlan -o parent=lan0 -o probe=perhaps", []string{"probe", "perhaps", "true or false"}},
	{"-o mode=macvlan -o parent=lan0 -o host_address=10.214.0.7 --subnet 10.214.0.0/24", []string{"host_address", "host_access=true"}},
	{"-o mode=macvlan -o parent=lan0 -o host_access=true -o host_address=10.9.9.9 --subnet 10.214.0.0/24", []string{"host_address", "10.9.9.9", "10.214.0.0/24"}},
	{"-o mode=macvlan -o parent=lan0 -o host_access=true -o host_address=10.214.0.1 --subnet 10.214.0.0/24 --gateway 10.214.0.1", []string{"host_address", "gateway"}},
	{"-o mode=macvlan -o parent=lan0 -o mtu=9000 --subnet 198.51.100.0/24", []string{"mtu", "9000", "1500", "lan0"}},
	{"-o mode=macvlan -o parent=lan0 -o mtu=1000 --subnet 198.51.100.0/24 --ipv6 --subnet fd00:214::/64", []string{"mtu", "1000", "1280"}},
	{"-o mode=macvlan -o parent=lan0 --internal -o egress=driver", []string{"egress", "--internal"}},
	{"-o mode=macvlan -o egress=driver", []string{"egress", "parent"}},
	{"-o mode=macvlan -o parent=lan0 -o routes=10.5.0.0/16", []string{"routes", "via"}},
	{"-o mode=macvlan -o parent=lan0 --subnet 10.214.0.0/24 -o routes=10.5.0.0/16,via,10.6.0.1", []string{"routes"}},
	{"-o mode=macvlan -o parent=lan0 --subnet 198.51.100.0/25", []string{"198.51.100.0/25", "lan0", "--subnet 198.51.100.0/24", "--ip-range"}},
	{"-o mode=macvlan -o parent=lan0 --subnet 198.51.0.0/16", []string{"198.51.0.0/16", "lan0", "--subnet 198.51.100.0/24"}},
	{"-o mode=macvlan -o parent=lan0", []string{"chosen automatically", "parent lan0 is in 198.51.100.0/24", "--subnet 198.51.100.0/24 --gateway ADDRESS", "dhcp=lan0"}},
	{"-o mode=macvlan -o parent=lan0 --subnet 198.51.100.0/24 --gateway " + host4, []string{host4, "this host's own", "lan0"}},
	{"--subnet 198.51.100.0/24", []string{"198.51.100.0/24", "by lan0", "choose another --subnet", "parent=lan0"}},
	// What follows is at odds with the network that is there.
	{"-o mode=macvlan -o parent=used0 -o macvlan_mode=passthru", []string{"used0", "passthru", "alone"}},
	{"-o mode=ipvlan -o parent=used0", []string{"used0", "mode=macvlan", "another parent"}},
	{"-o mode=macvlan -o parent=used0 --subnet 10.215.0.0/24", []string{"10.215.0.0/24", "with --ip-range 10.215.0.128/25", "such as 10.215.0.0/25"}},
	{"-o mode=macvlan -o parent=used0 --subnet 10.215.0.0/24 --ip-range 10.215.0.192/26", []string{"10.215.0.192/26", "overlaps 10.215.0.128/25", "such as 10.215.0.0/25"}},
	{"--subnet 10.215.0.0/24 --ip-range 10.215.0.0/25", []string{"subnet 10.215.0.0/24 overlaps with one of network", "choose another --subnet"}},
	{"-o mode=macvlan -o parent=lan0 --subnet 10.215.0.0/24 --ip-range 10.215.0.0/25", []string{"subnet 10.215.0.0/24 overlaps with one of network", "choose another --subnet"}},
	{"-o mode=macvlan -o parent=alone0", []string{"alone0", "passthru", "alone"}},
}

// TestLANParent is about the links that networks hang on.
func TestLANParent(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	t.Run("refused", func(t *testing.T) { refuse(t, w.e) })
	t.Run("gateway", func(t *testing.T) { lanGateway(t, w.e) })
	t.Run("shared subnet", func(t *testing.T) { shareSubnet(t, w.e) })
	t.Run("replaced", func(t *testing.T) { replaceParent(t, w.e) })
	t.Run("VLAN of the host", func(t *testing.T) { hostVLAN(t, w.e) })
}

// refuse asks for networks that cannot be, and reads the errors.
func refuse(t *testing.T, e *engine) {
	t.Helper()
	for _, l := range []string{"port0", "down0", "used0", "alone0"} {
		e.net(t, "ip", "link", "add", l, "type", "veth", "peer", "name", l+"p")
		e.net(t, "ip", "link", "set", l+"p", "up")
	}
	for _, l := range []string{"port0", "used0", "alone0"} {
		e.net(t, "ip", "link", "set", l, "up")
	}
	e.net(t, "ip", "link", "add", "br9", "type", "bridge")
	e.net(t, "ip", "link", "set", "br9", "up")
	e.net(t, "ip", "link", "set", "port0", "master", "br9")
	e.oursNetwork(t, "ours", "-o", "com.docker.network.bridge.name=wfbours")
	e.oursNetwork(t, "used", "-o", "mode=macvlan", "-o", "parent=used0", "--subnet", "10.215.0.0/24", "--ip-range", "10.215.0.128/25")
	e.oursNetwork(t, "alone", "-o", "mode=macvlan", "-o", "parent=alone0", "-o", "macvlan_mode=passthru", "--subnet", "10.216.0.0/24")
	before := e.links(t)
	for _, r := range refusals {
		all := append([]string{"network", "create", "-d", ours, "--ipam-driver", ours}, strings.Fields(r.args)...)
		_, err := e.docker(append(all, "refused")...)
		if err == nil {
			t.Errorf("%s was accepted", r.args)
			e.must(t, "network", "rm", "refused")
			continue
		}
		text := lastLine(err)
		for _, w := range r.words {
			if !strings.Contains(text, w) {
				t.Errorf("%s: the error does not say %q: %s", r.args, w, text)
			}
		}
		if strings.Contains(strings.TrimSpace(text), "\n") {
			t.Errorf("%s: the error has more than one line: %s", r.args, text)
		}
	}
	if after := e.links(t); len(after) != len(before) {
		t.Errorf("refused networks left links: %d before, %d after", len(before), len(after))
	}
	// What this kernel does not have is said in the same way.
	for args, kind := range map[string]string{
		"-o mode=ipvlan -o parent=lan0 --subnet 198.51.100.0/24": "ipvlan",
		"-o mode=macvlan -o parent=lan0.77":                      "vlan",
		"-o mode=macvlan":                                        "dummy",
	} {
		all := append([]string{"network", "create", "-d", ours, "--ipam-driver", ours}, strings.Fields(args)...)
		if _, err := e.docker(append(all, "kind")...); err == nil {
			e.must(t, "network", "rm", "kind")
		} else if text := lastLine(err); !strings.Contains(text, "this kernel has no") || !strings.Contains(text, kind) {
			t.Errorf("%s: the error does not say that the kernel lacks %s: %s", args, kind, text)
		}
	}
	e.removeAll(t)
	e.checkClean(t)
}

// lanGateway makes networks without --gateway on a LAN whose router the host knows,
// and on one whose router it does not.
func lanGateway(t *testing.T, e *engine) {
	t.Helper()
	args := []string{"network", "create", "-d", ours, "-o", "mode=macvlan", "-o", "parent=lan0", "--subnet", lan4, "--ip-range", lan4Range}
	gateway := func(name string) string {
		t.Helper()
		e.run(t, "alpha", "--network", name)
		defer e.must(t, "rm", "-f", "alpha")
		out := e.must(t, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}", "alpha")
		e.must(t, "rm", "-f", "alpha")
		e.must(t, "network", "rm", name)
		return out
	}
	e.must(t, append(args, "--ipam-driver", ours, "lan")...)
	if g := gateway("lan"); g != "" {
		t.Errorf("without a default route the gateway is %q, want none", g)
	}
	e.net(t, "ip", "route", "add", "default", "via", client4, "dev", "lan0")
	defer e.net(t, "ip", "route", "del", "default", "via", client4, "dev", "lan0")
	e.must(t, append(args, "--ipam-driver", ours, "lan")...)
	if g := gateway("lan"); g != client4 {
		t.Errorf("the gateway is %q, want the host's own, %s", g, client4)
	}
	// The engine's IPAM does not say whether it made the gateway up.
	out, err := e.docker(append(args, "lan")...)
	if err != nil {
		if text := lastLine(err); !strings.Contains(text, "--gateway "+client4) {
			t.Errorf("refused with %s", text)
		}
	} else if g := gateway("lan"); g != client4 {
		t.Errorf("the engine's IPAM: the gateway is %q, want the host's own, %s; %s", g, client4, out)
	}
}

// replaceParent pulls the card out and plugs it in again while containers
// start and stop.
func replaceParent(t *testing.T, e *engine) {
	t.Helper()
	e.oursNetwork(t, "lan", lan4Args("-o", "mode=macvlan", "-o", "host_access=true", "-o", "probe=false")...)
	e.run(t, "before", "--network", "lan", "--ip", "198.51.100.190")
	e.sees(t, e.lan.client, "198.51.100.190:80", "before")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var started, failed atomic.Int64
	for n := range 2 {
		wg.Go(func() {
			name := fmt.Sprintf("w%d", n)
			for {
				select {
				case <-stop:
					return
				default:
				}
				// With its parent away a start has to fail.
				if err := e.tryRun(name, "--network", "lan", "-p", "80"); err != nil {
					failed.Add(1)
				} else {
					started.Add(1)
				}
				if _, err := e.docker("rm", "-f", name); err != nil {
					t.Errorf("remove: %v", err)
				}
			}
		})
	}
	for range 3 {
		time.Sleep(time.Second)
		e.net(t, "ip", "link", "del", "lan0")
		time.Sleep(time.Second)
		e.connect(t)
	}
	time.Sleep(time.Second)
	close(stop)
	wg.Wait()
	note("parent replaced 3 times under load: %d starts, %d failed", started.Load(), failed.Load())
	if started.Load() == 0 || failed.Load() == 0 {
		t.Errorf("%d starts, %d failed: nothing was tested", started.Load(), failed.Load())
	}
	args := []string{"--network", "lan", "--ip", "198.51.100.191", "-p", "8080:80"}
	if err := e.tryRun("after", args...); err != nil {
		t.Errorf("the parent is back, but a container does not start: %s", lastLine(err))
		// It would in the next period, and then all the rest should be well.
		eventually(t, repairTime, "start", func() error {
			_, _ = e.docker("rm", "-f", "after")
			return e.tryRun("after", args...)
		})
	}
	e.sees(t, e.lan.client, "198.51.100.191:80", "after")
	// What lives on the host alone, the next period mends at the latest.
	eventually(t, repairTime, "host to container", func() error {
		out, err := output(e.inNet(suite.probe, "dial", "-timeout", "500ms", "tcp", "198.51.100.191:80"))
		if err == nil && !strings.Contains(out, `"after"`) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	e.works(t, 5*time.Second, host4+":8080")
	// A container that lost its interface gets one by being started again.
	e.must(t, "restart", "-t", "0", "before")
	e.sees(t, e.lan.client, "198.51.100.190:80", "before")
	e.removeAll(t)
	e.checkClean(t)
}

// hostVLAN hangs a network on a VLAN sub-interface that the host has already.
func hostVLAN(t *testing.T, e *engine) {
	t.Helper()
	needKind(t, e.machine, "vlan")
	e.net(t, "ip", "link", "add", "link", "lan0", "name", "lan0.30", "type", "vlan", "id", "30")
	e.net(t, "ip", "link", "set", "lan0.30", "addrgenmode", "none", "up")
	// The kernel says so a moment after it is true.
	eventually(t, 5*time.Second, "lan0.30 up", func() error {
		if s := e.snapshot(t, "lan0.30"); !strings.Contains(s, `"operstate":"UP"`) || strings.Contains(s, "tentative") {
			return fmt.Errorf("%s", s)
		}
		return nil
	})
	before := e.snapshot(t, "lan0.30")
	e.oursNetwork(t, "lan", "-o", "mode=macvlan", "-o", "parent=lan0.30", "--subnet", vlanNet)
	e.run(t, "alpha", "--network", "lan")
	e.removeAll(t)
	if after := e.snapshot(t, "lan0.30"); after != before {
		t.Errorf("the host's VLAN changed:\nbefore %s\nafter  %s", before, after)
	}
	e.checkClean(t)
}

// TestLANProbe has a station on the LAN that holds an address of the range
// which containers get theirs from.
func TestLANProbe(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	const taken, next = "198.51.100.160", "198.51.100.161"
	w.e.lan.station(t, "squatter", taken+"/24", "2001:db8:1::a00/64")
	args := []string{"--subnet", lan4, "--ip-range", lan4Range, "--gateway", client4, "--ipv6", "--subnet", lan6, "--ip-range", lan6Range, "--gateway", client6}
	t.Run("macvlan", func(t *testing.T) {
		probeLAN(t, w.e, taken, next, append(args, "-o", "mode=macvlan", "-o", "parent=lan0"))
	})
	t.Run("bridge", func(t *testing.T) {
		w.e.bridgeLAN(t)
		probeLAN(t, w.e, taken, next, append(args, "-o", "bridge=br0"))
	})
}

func probeLAN(t *testing.T, e *engine, taken, next string, args []string) {
	t.Helper()
	e.oursNetwork(t, "lan", args...)
	e.run(t, "alpha", "--network", "lan", "--ip6", "2001:db8:1::a05")
	if got := e.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.lan.IPAddress}}", "alpha"); got != next {
		t.Errorf("%s is a station's: the container was given %s, want %s", taken, got, next)
	}
	for flag, addr := range map[string]string{
		"--ip":  taken,
		"--ip6": "2001:db8:1::a00",
	} {
		e.refusedAddress(t, flag, addr, cardMAC(taken))
	}
	// The host's own address is somebody's too.
	e.refusedAddress(t, "--ip", host4, "")
	e.removeAll(t)
	e.oursNetwork(t, "lan", append(slices.Clone(args), "-o", "probe=false")...)
	e.run(t, "alpha", "--network", "lan")
	if got := e.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.lan.IPAddress}}", "alpha"); got != taken {
		t.Errorf("probe=false: the container was given %s, want %s", got, taken)
	}
	e.removeAll(t)
	e.checkClean(t)
}

// refusedAddress fails if a container starts with the address, or if the error
// does not say the address and word.
func (e *engine) refusedAddress(tb testing.TB, flag, addr, word string) {
	tb.Helper()
	err := e.tryRun("refused", "--network", "lan", flag, addr)
	_, _ = e.docker("rm", "-f", "refused")
	switch {
	case err == nil:
		tb.Errorf("%s %s is on the LAN already, and was given to a container", flag, addr)
	case !strings.Contains(lastLine(err), addr) || !strings.Contains(lastLine(err), word):
		tb.Errorf("%s %s: the error does not say %q: %s", flag, addr, word, lastLine(err))
	}
}
