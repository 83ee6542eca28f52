//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// machine is a process with namespaces of its own. Everything started in it
// dies with that process, and its links with the last of them.
type machine struct {
	name string
	dir  string // files of its own, outlives a reboot
	root string // file system, "" for this machine's
	init *exec.Cmd
	hold io.Closer // init ends when this closes
}

// newMachine starts one and ends it with the test.
func newMachine(tb testing.TB, name, root string) *machine {
	tb.Helper()
	dir, err := os.MkdirTemp(suite.dir, name+"-") //nolint:usetesting // its path would be too long for sockets
	if err != nil {
		tb.Fatal(err)
	}
	m := &machine{name: name, dir: dir, root: root}
	tb.Cleanup(func() {
		if err := m.off(); err != nil {
			tb.Errorf("switch %s off: %v", name, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("remove files of %s: %v", name, err)
		}
	})
	m.on(tb)
	return m
}

// on boots the machine: new namespaces, nothing but loopback.
func (m *machine) on(tb testing.TB) {
	tb.Helper()
	args := []string{"init", "-name", m.name}
	if m.root != "" {
		args = append(args, "-root", m.root, "-keep", suite.dir)
	}
	c := exec.Command(suite.probe, args...)
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
		Setpgid:    true, // an interrupt at the terminal is for the test alone
	}
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := c.Start(); err != nil {
		tb.Fatalf("start machine %s: %v", m.name, err)
	}
	m.init, m.hold = c, in
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		tb.Fatalf("machine %s said %q: %v", m.name, line, err)
	}
	m.net(tb, "ip", "link", "set", "lo", "up")
}

// off pulls the plug: every process of the machine is killed by the kernel.
func (m *machine) off() error {
	if m.init == nil {
		return nil
	}
	_ = m.hold.Close()
	_ = m.init.Process.Kill()
	_ = m.init.Wait() // killed, as asked
	m.init = nil
	return removeCgroups(m.cgroup())
}

// cgroup is the parent of the machine's containers' control groups.
func (m *machine) cgroup() string { return "/" + filepath.Base(suite.dir) + "-" + filepath.Base(m.dir) }

// removeCgroups removes the empty groups that killed containers leave behind.
func removeCgroups(name string) error {
	roots, err := filepath.Glob("/sys/fs/cgroup/*" + name)
	if err != nil {
		return err
	}
	roots = append(roots, "/sys/fs/cgroup"+name)
	for _, r := range roots {
		var dirs []string
		_ = filepath.WalkDir(r, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) {
			if err := rmdirSoon(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// rmdirSoon tries for a second: a killed process leaves its group only when
// the kernel has finished with it.
func rmdirSoon(dir string) error {
	var err error
	for range 50 {
		if err = os.Remove(dir); err == nil || os.IsNotExist(err) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

func (m *machine) pid() string { return strconv.Itoa(m.init.Process.Pid) }

// inNet is a command of this machine's files in the machine's network.
func (m *machine) inNet(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", m.pid(), "-n", "-u", "--"}, args...)...)
}

// inside is a command of the machine's files in all its namespaces.
func (m *machine) inside(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", m.pid(), "-n", "-m", "-u", "-i", "-p", "--"}, args...)...)
}

// net runs a command in the machine's network and returns what it printed.
func (m *machine) net(tb testing.TB, args ...string) string {
	tb.Helper()
	out, err := output(m.inNet(args...))
	if err != nil {
		tb.Fatalf("%s: %v", m.name, err)
	}
	return out
}

// output runs c and returns its stdout; the error carries its stderr.
func output(c *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// serve starts the probe's server in the machine's network; it ends with the
// test.
func (m *machine) serve(tb testing.TB, specs ...string) *exec.Cmd {
	tb.Helper()
	c := m.inNet(append([]string{suite.probe, "serve"}, specs...)...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { end(c) })
	// A datagram or connection sent before it listens would be refused.
	for _, s := range specs {
		proto, addr, _ := strings.Cut(s, ":")
		if !strings.Contains(addr, ":") {
			addr = ":" + addr
		}
		eventually(tb, 3*time.Second, "server on "+s, func() error {
			out, err := output(m.inNet(suite.probe, "free", proto, addr))
			if err != nil {
				return err
			}
			if !strings.Contains(out, "in use") {
				return fmt.Errorf("nobody listens: %s", stderr.String())
			}
			return nil
		})
	}
	return c
}

// end kills a process that the test started. nsenter execs what it runs, so
// there is no child to look for.
func end(c *exec.Cmd) {
	if c.Process != nil {
		_ = c.Process.Kill()
		_ = c.Wait() // killed, as asked
	}
}

// eventually calls f until it succeeds.
func eventually(tb testing.TB, limit time.Duration, what string, f func() error) {
	tb.Helper()
	var err error
	limit *= suite.slow
	for stop := time.Now().Add(limit); time.Now().Before(stop); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	tb.Fatalf("%s: not within %v: %v", what, limit, err)
}

// iface is one interface as "probe facts" prints it.
type iface struct {
	Name        string
	MTU         int
	MAC         string
	Up          bool
	Promiscuous bool
	Addrs       []string
	Routes      []string
}

func parseFacts(out string) ([]iface, error) {
	var f []iface
	return f, json.Unmarshal([]byte(out), &f)
}

// Addresses of the LAN. They are documentation ranges, so that neither
// driver's automatic pools can collide with them.
const (
	host4, host6     = "198.51.100.1", "2001:db8:1::1"
	second4, second6 = "198.51.100.2", "2001:db8:1::2"
	client4, client6 = "198.51.100.100", "2001:db8:1::100"
)

// lan is a switch, a machine on it, and whatever else is plugged in.
type lan struct {
	wire, client *machine
}

// newLAN makes the switch and the client. The switch has a namespace of its
// own: an engine beside it would filter what passes over the bridge.
func newLAN(tb testing.TB) *lan {
	tb.Helper()
	l := &lan{wire: newMachine(tb, "wire", ""), client: newMachine(tb, "client", "")}
	l.wire.net(tb, "ip", "link", "add", "sw0", "type", "bridge")
	l.wire.net(tb, "ip", "link", "set", "sw0", "up")
	l.plug(tb, l.client, client4+"/24", client6+"/64")
	// The client believes that every container network is behind the host.
	l.client.net(tb, "ip", "route", "add", "10.0.0.0/8", "via", host4)
	l.client.net(tb, "ip", "-6", "route", "add", "fd00::/8", "via", host6)
	return l
}

// plug connects a machine to the switch and gives it addresses. Its card keeps
// its MAC address over a reboot, as a real one does, or neighbours would go on
// sending to the old one.
func (l *lan) plug(tb testing.TB, m *machine, addrs ...string) {
	tb.Helper()
	port := "p-" + m.name
	mac := cardMAC(netip.MustParsePrefix(addrs[0]).Addr().String())
	l.wire.net(tb, "ip", "link", "add", port, "type", "veth", "peer", "name", "lan0", "address", mac, "netns", m.pid())
	l.wire.net(tb, "ip", "link", "set", port, "master", "sw0", "up")
	for i, a := range addrs {
		args := []string{"ip", "addr", "add", a, "dev", "lan0", "nodad"}
		if i > 1 {
			// Further addresses are for who asks for them, not sources of choice.
			args = append(args, "preferred_lft", "0")
		}
		m.net(tb, args...)
	}
	m.net(tb, "ip", "link", "set", "lan0", "up")
}

// station makes a machine that has one address and nothing else to do with
// engines.
func (l *lan) station(tb testing.TB, name string, addrs ...string) *machine {
	tb.Helper()
	m := newMachine(tb, name, "")
	l.plug(tb, m, addrs...)
	return m
}

// cardMAC is the MAC address of the card of the machine with this address.
func cardMAC(addr string) string {
	ip := netip.MustParseAddr(addr).As4()
	return fmt.Sprintf("02:00:%02x:%02x:%02x:%02x", ip[0], ip[1], ip[2], ip[3])
}
