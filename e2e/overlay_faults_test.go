//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// soak reports whether faults are to last as long as real ones do.
func soak() bool { return os.Getenv("WEFT_SOAK") != "" }

// lasting is for how long a fault lasts.
func lasting(usual, long time.Duration) time.Duration {
	if soak() {
		return long
	}
	return usual
}

// lost ends a flow and returns how many datagrams did not come back, and for how
// long at most none did.
func (s *streamer) lost(tb testing.TB) (lost int, outage time.Duration) {
	tb.Helper()
	_ = s.in.Close()
	if err := s.cmd.Wait(); err != nil {
		tb.Fatalf("flow: %v %s", err, s.out)
	}
	var sent, ms int
	if _, err := fmt.Sscan(s.out.String(), &sent, &lost, &ms); err != nil || sent == 0 || lost == sent {
		tb.Fatalf("flow said %q: nothing passed", s.out)
	}
	return lost, time.Duration(ms) * time.Millisecond
}

// whole ends a flow of which nothing may be lost.
func (s *streamer) whole(tb testing.TB) {
	tb.Helper()
	if lost, outage := s.lost(tb); lost > 0 {
		tb.Errorf("%d datagrams were lost, up to %v in a row", lost, outage)
	}
}

// set changes a setting of the plugins, which have to be disabled for that. All
// are before any of them is enabled again.
func (all members) set(tb testing.TB, settings ...string) {
	tb.Helper()
	for i, e := range all {
		e.must(tb, "plugin", "disable", "-f", pluginName)
		e.must(tb, "plugin", "set", pluginName, settings[i])
	}
	for _, e := range all {
		e.must(tb, "plugin", "enable", pluginName)
		e.waitPlugin(tb)
	}
}

// said counts lines of the plugin's log.
func (e *engine) said(tb testing.TB, what string) int {
	tb.Helper()
	n := 0
	for _, l := range e.pluginLog(tb) {
		if strings.Contains(l, what) {
			n++
		}
	}
	return n
}

// TestOverlayFaults stops, kills, moves and renames what tells the others, while
// a container on the first host talks to one on the second: hosts that gossip, and
// hosts that have etcd.
func TestOverlayFaults(t *testing.T) {
	t.Parallel()
	t.Run("gossip", func(t *testing.T) {
		t.Parallel()
		overlayFaults(t, newLAN(t), nil)
	})
	t.Run("etcd", func(t *testing.T) {
		t.Parallel()
		l := newLAN(t)
		overlayFaults(t, l, etcdOn(t, l.client))
	})
}

// overlayFaults has the hosts of a LAN know each other by etcd on its client, or,
// without it, by gossip.
func overlayFaults(t *testing.T, l *lan, etcd *exec.Cmd) {
	t.Helper()
	var all members
	for i := range 3 {
		// The second host's containers outlive its engine, the third's do not.
		config := map[string]any{"live-restore": i == 1}
		all = append(all, l.host(t, fmt.Sprintf("host%d", i+1), []string{underlayAddr(i+1) + "/24"}, config, func(*engine) {}))
	}
	again := func() { etcdOn(t, l.client) }
	port := "7947"
	if etcd == nil {
		all.join(t)
	} else {
		port = "2379"
		for _, e := range all {
			e.installPlugin(t, "STORE=etcd://"+client4+":"+port, "UNDERLAY=lan0")
		}
	}
	all.network(t, "blue")
	containers := []string{"alpha", "beta", "gamma"}
	for i, e := range all {
		e.run(t, containers[i], "--network", "blue", "--hostname", e.name)
	}
	all.exact(t, "blue", 10*time.Second)
	all.reach(t, containers)
	one, two, three := all[0], all[1], all[2]
	to := two.addresses(t, "beta", "blue")[0]
	// start sends numbered datagrams, which come back.
	start := func(tb testing.TB) *streamer {
		tb.Helper()
		c, err := one.in("alpha", "/probe", "flow", to+":53")
		if err != nil {
			tb.Fatal(err)
		}
		return startUntilClosed(tb, c)
	}
	// What comes after a fault that failed would fail for the same reason.
	ok := t.Run("plugin disabled", func(t *testing.T) {
		f := start(t)
		end := time.Now().Add(lasting(15*time.Second, 5*time.Minute))
		two.must(t, "plugin", "disable", "-f", pluginName)
		silent := one.hears(t, "host2", "silent", 15*time.Second)
		three.run(t, "meanwhile", "--network", "blue")
		time.Sleep(time.Until(end))
		two.must(t, "plugin", "enable", pluginName)
		note("overlay, plugin disabled: silent after %v, heard again after %v", silent, one.hears(t, "host2", "heard", 10*time.Second))
		all.exact(t, "blue", 10*time.Second) // also what came meanwhile
		f.whole(t)
		three.must(t, "rm", "-f", "meanwhile")
		all.settled(t)
	})
	ok = ok && t.Run("plugin killed", func(t *testing.T) {
		f := start(t)
		two.killPlugin(t)
		two.waitPlugin(t)
		time.Sleep(time.Second) // the engine registers it again
		two.run(t, "new", "--network", "blue")
		all.exact(t, "blue", 10*time.Second)
		f.whole(t)
		two.must(t, "rm", "-f", "new")
		all.settled(t)
	})
	ok = ok && t.Run("plugin stopped", func(t *testing.T) {
		f := start(t)
		pid := two.pluginPID(t)
		end := time.Now().Add(lasting(15*time.Second, time.Minute))
		for _, sig := range []string{"STOP", "CONT"} {
			if _, err := output(two.signal(sig, pid)); err != nil {
				t.Fatal(err)
			}
			if sig == "STOP" {
				one.hears(t, "host2", "silent", 15*time.Second)
				time.Sleep(time.Until(end))
			}
		}
		one.hears(t, "host2", "heard", 15*time.Second)
		f.whole(t)
		all.settled(t)
	})
	ok = ok && t.Run("engine killed", func(t *testing.T) {
		f := start(t)
		two.kill(t)
		three.kill(t)
		time.Sleep(time.Second)
		two.start(t)
		three.start(t)
		two.waitPlugin(t)
		three.waitPlugin(t)
		if out := three.must(t, "ps", "-q"); out != "" {
			t.Fatalf("without live-restore %s goes on", out)
		}
		all.exact(t, "blue", 15*time.Second)
		f.whole(t)
		three.must(t, "start", "gamma")
		all.settled(t)
	})
	ok = ok && t.Run("host rebooted", func(t *testing.T) {
		f := start(t)
		three.reboot(t)
		three.waitPlugin(t)
		all.exact(t, "blue", 15*time.Second)
		f.whole(t)
		three.must(t, "start", "gamma")
		all.exact(t, "blue", 10*time.Second)
		all.reach(t, containers)
		all.settled(t)
	})
	ok = ok && t.Run("host renamed", func(t *testing.T) {
		f := start(t)
		two.net(t, "hostname", "renamed")
		two.must(t, "plugin", "disable", "-f", pluginName)
		two.must(t, "plugin", "enable", pluginName)
		for _, e := range []*engine{one, three} {
			e.hears(t, "renamed", "heard", 15*time.Second)
		}
		f.whole(t)
		all.settled(t)
	})
	ok = ok && t.Run("underlay address changed", func(t *testing.T) {
		f := start(t)
		two.net(t, "ip", "addr", "del", two.addrs[0], "dev", "lan0")
		two.addrs[0] = underlayAddr(20) + "/24"
		two.net(t, "ip", "addr", "add", two.addrs[0], "dev", "lan0")
		moved := all.exact(t, "blue", 25*time.Second)
		one.hears(t, "renamed", "heard", 15*time.Second)
		one.dials(t, "alpha", to, "host2")
		lost, outage := f.lost(t)
		if lost == 0 {
			t.Error("nothing was lost: the address was not in use")
		}
		note("overlay, underlay address changed: exact after %v, no traffic for %v", moved, outage)
		if limit := 25 * time.Second * suite.slow; outage > limit {
			t.Errorf("traffic was back after %v, want %v at most", outage, limit)
		}
		all.settled(t)
	})
	ok = ok && t.Run("30 % of what hosts say lost", func(t *testing.T) {
		for _, e := range all {
			e.net(t, "nft", fmt.Sprintf(`add table inet lossy; add chain inet lossy in { type filter hook input priority -300; };
				add rule inet lossy in meta l4proto { tcp, udp } @th,%d,16 %s numgen random mod 100 < 30 counter drop`, map[bool]int{true: 16, false: 0}[etcd == nil], port))
		}
		for i, e := range all {
			name := fmt.Sprintf("lossy%d", i)
			e.run(t, name, "--network", "blue")
			note("%s: a new container is known after %v", t.Name(), all.exact(t, "blue", 10*time.Second))
			e.must(t, "rm", "-f", name)
		}
		for _, e := range all {
			if out := e.net(t, "nft", "list", "table", "inet", "lossy"); strings.Contains(out, "packets 0 ") {
				t.Errorf("nothing was lost on %s: %s", e.name, out)
			}
			e.net(t, "nft", "delete table inet lossy")
		}
		all.settled(t)
	})
	ok = ok && (etcd == nil || t.Run("etcd stopped", func(t *testing.T) {
		f := start(t)
		end(etcd)
		stopped := time.Now()
		one.run(t, "meanwhile", "--network", "blue")
		one.dials(t, "meanwhile", one.addresses(t, "alpha", "blue")[0], "host1") // on this host
		three.must(t, "rm", "-f", "gamma")
		time.Sleep(time.Until(stopped.Add(lasting(15*time.Second, 5*time.Minute))))
		again() // which ends with the whole test, not with this part of it
		all.settled(t)
		f.whole(t)
		one.must(t, "rm", "-f", "meanwhile")
		three.run(t, "gamma", "--network", "blue", "--hostname", three.name)
		all.reach(t, containers)
		all.settled(t)
	}))
	_ = ok && t.Run("partition", func(t *testing.T) {
		// A host that is cut off from etcd cannot tell who else is.
		all.partition(t, 20*time.Second, map[bool]string{true: "silent", false: "unknown"}[etcd == nil])
		all.settled(t)
	})

	all.removeAll(t)
}

// settled waits until all hosts are exact after a fault.
func (all members) settled(t *testing.T) {
	t.Helper()
	note("%s: entries exact %v after", t.Name(), all.exact(t, "blue", 15*time.Second))
}

// removeAll removes all containers and the network from all hosts.
func (all members) removeAll(t *testing.T) {
	t.Helper()
	for _, e := range all {
		e.removeAll(t)
	}
	for _, e := range all {
		e.checkCleanIn(t, 40*time.Second)
	}
}

// partition cuts the third host off, for longer than it takes to be given up,
// while both sides start and stop containers, and give one address to two. others
// is what it says of the other hosts meanwhile.
func (all members) partition(t *testing.T, d time.Duration, others string) {
	t.Helper()
	one, two, three := all[0], all[1], all[2]
	const twice = "10.44.200.1"
	for _, e := range all {
		e.run(t, "old-"+e.name, "--network", "blue")
	}
	all.exact(t, "blue", 10*time.Second)
	port := "p-" + three.name
	one.lan.wire.net(t, "ip", "link", "set", port, "down")
	end := time.Now().Add(d)
	one.hears(t, three.name, "silent", 15*time.Second)
	three.hears(t, one.name, others, 15*time.Second)
	one.run(t, "first", "--network", "blue", "--ip", twice)
	for _, e := range all {
		e.must(t, "rm", "-f", "old-"+e.name)
		e.run(t, "new-"+e.name, "--network", "blue")
	}
	three.run(t, "later", "--network", "blue", "--ip", twice)
	time.Sleep(time.Until(end))
	one.lan.wire.net(t, "ip", "link", "set", port, "up")
	note("overlay, partition: entries exact %v after it ended", all.exact(t, "blue", 20*time.Second))
	// The loser does not know, and says what it likes to.
	c, err := one.in("first", "/probe", "dial", "-timeout", "500ms", "udp", two.addresses(t, "new-"+two.name, "blue")[0]+":53")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := output(c); err != nil {
		t.Fatal(err)
	}
	for _, from := range []*engine{one, two} {
		from.dials(t, "new-"+from.name, twice, "later")
	}
	all.exact(t, "blue", 15*time.Second)
	for _, e := range []*engine{one, three} {
		what := twice + " is claimed by host"
		eventually(t, 5*time.Second, "both hosts say that the address was given twice", func() error {
			out, err := e.peers(t)
			if err == nil && (!strings.Contains(out, what) || !strings.Contains(out, "that of "+three.name)) {
				err = fmt.Errorf("%s says:\n%s", e.name, out)
			}
			return err
		})
		if e.said(t, what) == 0 {
			t.Errorf("the log of %s does not say that %s was given twice", e.name, twice)
		}
	}
	one.must(t, "rm", "-f", "first", "new-"+one.name)
	two.must(t, "rm", "-f", "new-"+two.name)
	three.must(t, "rm", "-f", "later", "new-"+three.name)
	for _, e := range all {
		eventually(t, 5*time.Second, "the conflict is over", func() error {
			out, err := e.peers(t)
			if strings.Contains(out, "claimed") {
				err = errors.New(out)
			}
			return err
		})
	}
}

// TestOverlaySecret is what SECRET keeps out and hides, and a host that is lost
// for good.
func TestOverlaySecret(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	one, two, three := all[0], all[1], all[2]
	all.join(t, "SECRET=", "GRACE=20s")
	for _, e := range all {
		e.hears(t, all[(slices.Index(all, e)+1)%3].name, "heard", 15*time.Second)
	}
	t.Run("clear text", func(t *testing.T) {
		// Also shows that the capture is of what matters.
		if missing := all.listen(t); len(missing) > 2 {
			t.Errorf("without SECRET, a capture has only some of what hosts say: not %q", missing)
		}
	})
	t.Run("hidden", func(t *testing.T) {
		all.set(t, "SECRET="+secret, "SECRET="+secret, "SECRET=wrong")
		one.hears(t, "host2", "heard", 15*time.Second)
		if missing := all.listen(t); len(missing) < 8 {
			t.Errorf("with SECRET, a capture shows all but %q", missing)
		}
	})
	t.Run("wrong", func(t *testing.T) {
		all.network(t, "blue")
		for _, e := range all {
			e.run(t, "on-"+e.name, "--network", "blue")
			e.run(t, "also-"+e.name, "--network", "blue")
		}
		members{one, two}.exact(t, "blue", 10*time.Second)
		members{three}.exact(t, "blue", 10*time.Second) // alone: nothing leads out
		three.dials(t, "on-host3", three.addresses(t, "also-host3", "blue")[0], "also-host3")
		time.Sleep(3 * time.Second) // some attempts to join
		for _, e := range all {
			n := e.said(t, "has another password than this one")
			if most := map[bool]int{true: 2, false: 1}[e == three]; n < 1 || n > most {
				t.Errorf("%s says %d times that the password differs, want once for each other host", e.name, n)
			}
		}
		for _, pair := range [][2]*engine{{one, three}, {three, one}} {
			out, err := pair[0].peers(t)
			if err != nil || strings.Contains(out, pair[1].name) || !strings.Contains(out, "! "+pair[1].vtep()) || !strings.Contains(out, "it has another password") {
				t.Errorf("%s knows %s, or does not say why not: %s %v", pair[0].name, pair[1].name, out, err)
			}
		}
		members{three}.set(t, "SECRET="+secret)
		note("overlay, wrong SECRET: entries exact %v after it was right", all.exact(t, "blue", 15*time.Second))
	})
	t.Run("host lost", func(t *testing.T) {
		addr := two.addresses(t, "on-host2", "blue")[0]
		other := two.addresses(t, "also-host2", "blue")[0]
		one.dials(t, "on-host1", addr, "on-host2")
		if err := two.off(); err != nil {
			t.Fatal(err)
		}
		_ = two.daemon.Wait() // killed with the machine
		lost := time.Now()
		one.hears(t, "host2", "silent", 15*time.Second)
		three.hears(t, "host2", "silent", 15*time.Second)
		three.run(t, "replaces", "--network", "blue", "--ip", addr)
		one.dials(t, "on-host1", addr, "replaces")
		note("overlay, host lost: its address is reached elsewhere %v after it was lost", time.Since(lost).Round(100*time.Millisecond))
		for _, e := range []*engine{one, three} {
			have, err := e.entries(t, "blue")
			// On a slow machine the grace time may be over.
			if all := strings.Join(have, "\n"); (err != nil || !strings.Contains(all, "neighbour "+other) || !strings.Contains(all, "flood "+two.vtep())) && time.Since(lost) < 18*time.Second {
				t.Errorf("%s forgot the lost host before the grace time: %v\n%s", e.name, err, all)
			}
		}
		left := members{one, three}
		left.exact(t, "blue", 40*time.Second)
		gone := time.Since(lost).Round(100 * time.Millisecond)
		note("overlay, host lost: nothing leads to it %v after it was lost, GRACE=20s", gone)
		if gone < 20*time.Second {
			t.Errorf("the lost host was forgotten after %v, want GRACE=20s", gone)
		}
		one.dials(t, "on-host1", addr, "replaces")
		left.removeAll(t)
	})
}

// listen captures the gossip while a network and a container are made, and
// returns which of the things that hosts say are not in it.
func (all members) listen(t *testing.T) (missing []string) {
	t.Helper()
	wire := all[0].lan.wire
	file := filepath.Join(wire.dir, "gossip.pcap")
	c := wire.inNet("tcpdump", "-i", "sw0", "-U", "-s", "0", "-w", file, "port", "7947")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer end(c)
	size := func() int64 {
		s, err := os.Stat(file)
		if err != nil {
			return 0
		}
		return s.Size()
	}
	eventually(t, 10*time.Second, "capture begins", func() error {
		if size() < 100 { // the header, and something
			return fmt.Errorf("nothing yet: %s", stderr.String())
		}
		return nil
	})
	all.network(t, "seen")
	var marks []string
	for _, e := range all[:2] {
		e.run(t, "seen", "--network", "seen")
		a := e.addresses(t, "seen", "seen")
		mac := e.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.seen.MacAddress}}", "seen")
		marks = append(marks, e.name, mac, a[0], a[1])
	}
	members{all[0], all[1]}.heardOf(t, "seen")
	all.removeAll(t)
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // as asked
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) < 4096 {
		t.Fatalf("a capture of %d bytes: %s", len(b), stderr.String())
	}
	for _, m := range marks {
		if !bytes.Contains(b, []byte(m)) && !bytes.Contains(b, raw(m)) {
			missing = append(missing, m)
		}
	}
	return missing
}

// heardOf waits until both of two hosts have what leads to the other.
func (all members) heardOf(t *testing.T, network string) {
	t.Helper()
	eventually(t, 10*time.Second, "entries of both", func() error {
		for _, e := range all {
			have, err := e.entries(t, network)
			if err != nil || len(have) == 0 {
				return fmt.Errorf("%s has %q: %w", e.name, have, err)
			}
		}
		return nil
	})
}

// raw is an address as a packet has it.
func raw(s string) []byte {
	if mac, err := net.ParseMAC(s); err == nil {
		return mac
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return a.AsSlice()
	}
	return []byte(s)
}
