//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// box is a container on one of the hosts.
type box struct {
	e     *engine
	name  string
	addrs []string // on the network that the test is about
}

// boxes starts one container on each host, and one more on the first.
func (all members) boxes(tb testing.TB, network string) []box {
	tb.Helper()
	list := []box{{e: all[0], name: network + "0"}}
	for i, e := range all {
		list = append(list, box{e: e, name: fmt.Sprintf("%s%d", network, i+1)})
	}
	for i, b := range list {
		b.e.run(tb, b.name, "--network", network)
		list[i].addrs = b.e.addresses(tb, b.name, network)
	}
	return list
}

// probe runs the probe in the container.
func (b box) probe(args ...string) (string, error) {
	c, err := b.e.in(b.name, append([]string{"/probe"}, args...)...)
	if err != nil {
		return "", err
	}
	out, err := output(c)
	return strings.TrimSpace(out), err
}

// reachAll lets every container reach every other one: echo, TCP and UDP.
func reachAll(tb testing.TB, list []box) {
	tb.Helper()
	for _, from := range list {
		for _, to := range list {
			if from.name == to.name {
				continue
			}
			for _, a := range to.addrs {
				from.e.dials(tb, from.name, a, to.name)
				if out, err := from.probe("ping", a); err != nil || strings.Contains(out, `"err"`) {
					tb.Errorf("%s pings %s at %s: %s %v", from.name, to.name, a, out, err)
				}
			}
		}
	}
}

// transcript is what a process has printed so far.
type transcript struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *transcript) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.Write(b)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// talker is a command that goes on until its stdin ends.
type talker struct {
	cmd *exec.Cmd
	in  io.Closer
	out transcript
	err transcript
}

// start starts the probe in the container, until the test ends or stop.
func (b box) start(tb testing.TB, args ...string) *talker {
	tb.Helper()
	c, err := b.e.in(b.name, append([]string{"/probe"}, args...)...)
	if err != nil {
		tb.Fatal(err)
	}
	t := &talker{cmd: c}
	c.Stdout, c.Stderr, c.WaitDelay = &t.out, &t.err, 5*time.Second
	if t.in, err = c.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	if err := c.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		// What is to be ended is a child of nsenter, and may be left to itself.
		_ = t.in.Close()
		end(c)
	})
	return t
}

// stop ends it and returns its lines.
func (t *talker) stop(tb testing.TB) []string {
	tb.Helper()
	_ = t.in.Close()
	if err := t.cmd.Wait(); err != nil {
		tb.Errorf("%s: %v %s", strings.Join(t.cmd.Args, " "), err, t.err.String())
	}
	return strings.Split(strings.TrimSpace(t.out.String()), "\n")
}

// The groups of the tests: one each of the organization's and of the site's scope.
const (
	group4, group6 = "239.1.2.3", "ff05::1:3"
	shoutPort      = "7001"
)

// manyOnce lets every container send to groups and to everybody: all others get
// one copy each.
func manyOnce(t *testing.T, list []box) {
	t.Helper()
	ears := make([]*talker, len(list))
	for i, b := range list {
		ears[i] = b.start(t, "hear", b.addrs[0], shoutPort, group4, group6)
	}
	for i, b := range list {
		eventually(t, 5*time.Second, b.name+" listens", func() error {
			if !strings.HasPrefix(ears[i].out.String(), "ready\n") {
				return fmt.Errorf("said %q %q", ears[i].out.String(), ears[i].err.String())
			}
			return nil
		})
	}
	to := []string{group4, "[" + group6 + "]", "10.44.255.255", "255.255.255.255"}
	for _, b := range list {
		for _, addr := range to {
			if _, err := b.probe("shout", b.addrs[0], addr+":"+shoutPort, b.name+" to "+addr); err != nil {
				t.Fatal(err)
			}
		}
	}
	const last = " to 255.255.255.255"
	for i, b := range list {
		eventually(t, 5*time.Second, b.name+" hears the last", func() error {
			want := list[len(list)-1].name + last
			if i == len(list)-1 {
				want = list[i-1].name + last
			}
			if !strings.Contains(ears[i].out.String(), want) {
				return fmt.Errorf("heard %q, not %q", ears[i].out.String(), want)
			}
			return nil
		})
	}
	time.Sleep(300 * time.Millisecond) // for what should not come
	for i, b := range list {
		heard := map[string]int{}
		for _, l := range ears[i].stop(t) {
			heard[l]++
		}
		for _, from := range list {
			for _, addr := range to {
				what, most, least := from.name+" to "+addr, 1, 1
				if from.name == b.name { // the kernel loops back a broadcast, and nothing else
					least = 0
					if !strings.HasSuffix(addr, ".255") {
						most = 0
					}
				}
				if n := heard[what]; n < least || n > most {
					t.Errorf("%s on %s heard %q %d times, want %d to %d", b.name, b.e.name, what, n, least, most)
				}
			}
		}
	}
}

// count counts the packets that come to a host and match.
func (e *engine) count(tb testing.TB, match ...string) {
	tb.Helper()
	e.net(tb, "nft", "add", "table", "inet", "counts")
	e.net(tb, "nft", "add", "chain", "inet", "counts", "in", "{ type filter hook prerouting priority -400; }")
	e.net(tb, append([]string{"nft", "add", "rule", "inet", "counts", "in"}, append(match, "counter")...)...)
}

// counted reports whether any came.
func (e *engine) counted(tb testing.TB) bool {
	tb.Helper()
	out := e.net(tb, "nft", "list", "table", "inet", "counts")
	if !strings.Contains(out, "counter packets ") {
		tb.Fatalf("no counter in %s", out)
	}
	return !strings.Contains(out, "counter packets 0 ")
}

// TestOverlayData is what passes between three hosts on an IPv4 underlay.
func TestOverlayData(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	all.join(t)
	all.network(t, "blue")
	list := all.boxes(t, "blue")
	t.Run("reach", func(t *testing.T) {
		reachAll(t, list)
		all.agree(t, "blue")
	})
	t.Run("many", func(t *testing.T) { manyOnce(t, list) })
	t.Run("elsewhere", func(t *testing.T) { all.elsewhere(t) })
	t.Run("refusals", func(t *testing.T) { all.refusals(t, list) })
	t.Run("egress", func(t *testing.T) { all.egress(t) })
	t.Run("moves", func(t *testing.T) { all.moves(t) })
	t.Run("mtu", func(t *testing.T) { all[:2].mtus(t, 50) })
	t.Run("repair", func(t *testing.T) { all.repair(t, list) })
	all.agree(t, "blue")
	all.answered(t)
	all.end(t)
}

// answered is every host's status saying that what it sends through the tunnels arrives.
func (all members) answered(t *testing.T) {
	t.Helper()
	for _, e := range all {
		eventually(t, 30*time.Second, "all answer "+e.name+" through the tunnels", func() error {
			out, err := e.peers(t)
			if err != nil {
				return err
			}
			if n := strings.Count(out, "answered ") - strings.Count(out, "answered 0"); n != len(all)-1 || strings.Contains(out, "packets do not arrive") {
				return fmt.Errorf("%d hosts answer:\n%s", n, out)
			}
			return nil
		})
	}
}

// end removes everything and looks that nothing is left.
func (all members) end(t *testing.T) {
	t.Helper()
	for _, e := range all {
		e.checkAgrees(t)
	}
	for _, e := range all {
		e.removeAll(t)
	}
	for _, e := range all {
		e.checkCleanIn(t, 40*time.Second)
	}
}

// elsewhere is a network that the third host does not have: it gets nothing of
// it.
func (all members) elsewhere(t *testing.T) {
	t.Helper()
	const port = "4794"
	two := all[:2]
	for _, e := range two {
		e.must(t, e.overlayArgs("red", 45, "-o", "vni=4243", "-o", "port="+port)...)
	}
	for _, e := range all {
		e.count(t, "udp", "dport", port)
	}
	list := two.boxes(t, "red")
	for _, b := range list {
		for _, addr := range []string{group4, "10.45.255.255", "10.45.200.1"} { // the last one nobody has
			if _, err := b.probe("shout", b.addrs[0], addr+":"+shoutPort, "hello"); err != nil {
				t.Fatal(err)
			}
		}
	}
	reachAll(t, list)
	two.agree(t, "red")
	for i, e := range all {
		if got, want := e.counted(t), i < 2; got != want {
			t.Errorf("%s got packets of a network of host1 and host2: %v, want %v", e.name, got, want)
		}
	}
	two.drop(t, "red", list)
}

// drop removes containers and then their network on all hosts.
func (all members) drop(tb testing.TB, network string, list []box) {
	tb.Helper()
	for _, b := range list {
		b.e.must(tb, "rm", "-f", b.name)
	}
	for _, e := range all {
		if err := e.removeNetworks(tb, []string{network}); err != nil {
			tb.Fatal(err)
		}
	}
}

// overlayArgs make an overlay network of 10.N.0.0/16 and fdN::/64, of which the
// host hands out the part with its number.
func (e *engine) overlayArgs(name string, n int, args ...string) []string {
	part := strings.TrimPrefix(e.name, "host")
	all := []string{"network", "create", "-d", ours, "--ipam-driver", ours, "-o", "mode=overlay", "--ipv6",
		"--subnet", fmt.Sprintf("10.%d.0.0/16", n), "--ip-range", fmt.Sprintf("10.%d.%s.0/24", n, part),
		"--subnet", fmt.Sprintf("fd%d::/64", n), "--ip-range", fmt.Sprintf("fd%d::%s:0/112", n, part)}
	return append(append(all, args...), name)
}
