//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The router's subnet where the host has no address of the LAN.
const (
	home4, homeNet = "192.168.178.1", "192.168.178.0/24"
)

// dnsmasq is a DHCP server on the client of a LAN, which is the router.
type dnsmasq struct {
	m    *machine
	dir  string
	args []string
	cmd  *exec.Cmd
}

// dhcp starts a server that hands out a range of a /24; it ends with the test.
func (l *lan) dhcp(tb testing.TB, link, router, first, last string) *dnsmasq {
	tb.Helper()
	dir, err := os.MkdirTemp(l.client.dir, "dhcp") //nolint:usetesting // to go with the machine
	if err != nil {
		tb.Fatal(err)
	}
	program, err := exec.LookPath("dnsmasq")
	if err != nil {
		tb.Fatalf("needs dnsmasq (Debian: dnsmasq-base): %v", err)
	}
	s := &dnsmasq{m: l.client, dir: dir}
	// AppArmor's profile is for the path of Debian.
	if _, err := output(exec.Command("cp", program, s.file("dnsmasq"))); err != nil {
		tb.Fatal(err)
	}
	s.args = []string{s.file("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--group=root", "--pid-file=",
		"--port=0", "--no-ping", "--log-dhcp", "--log-facility=" + s.file("log"), "--interface=" + link, "--except-interface=lo",
		"--dhcp-leasefile=" + s.file("leases"), "--dhcp-range=" + first + "," + last + ",255.255.255.0,2m",
		"--dhcp-option=3," + router, "--dhcp-authoritative"}
	tb.Cleanup(func() {
		s.stop()
		if log := s.log(tb); tb.Failed() {
			tb.Logf("end of dnsmasq's log:\n%s", log[max(0, len(log)-4000):])
		}
	})
	s.start(tb)
	return s
}

// dhcpHost is a server for the LAN that the host has addresses of, dhcpHome one
// for another subnet.
func (l *lan) dhcpHost(tb testing.TB) *dnsmasq {
	tb.Helper()
	return l.dhcp(tb, "lan0", client4, "198.51.100.160", "198.51.100.191")
}

func (l *lan) dhcpHome(tb testing.TB) *dnsmasq {
	tb.Helper()
	l.client.net(tb, "ip", "addr", "replace", home4+"/24", "dev", "lan0")
	return l.dhcp(tb, "lan0", home4, "192.168.178.20", "192.168.178.200")
}

func (s *dnsmasq) file(name string) string { return filepath.Join(s.dir, name) }

// start starts the server with the leases that it had.
func (s *dnsmasq) start(tb testing.TB) {
	tb.Helper()
	s.cmd = s.m.inNet(s.args...)
	if err := s.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	eventually(tb, 10*time.Second, "dnsmasq listens", func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/udp", s.cmd.Process.Pid))
		if err == nil && !strings.Contains(string(b), ":0043 ") {
			err = fmt.Errorf("not yet: %s", s.log(tb))
		}
		return err
	})
}

// stop ends it as a power cut would.
func (s *dnsmasq) stop() { end(s.cmd) }

func (s *dnsmasq) log(tb testing.TB) string {
	tb.Helper()
	b, err := os.ReadFile(s.file("log"))
	if err != nil && !os.IsNotExist(err) {
		tb.Fatal(err)
	}
	return string(b)
}

// leases are what the server has granted: hardware addresses by address.
func (s *dnsmasq) leases(tb testing.TB) map[string]string {
	tb.Helper()
	b, err := os.ReadFile(s.file("leases"))
	if err != nil && !os.IsNotExist(err) {
		tb.Fatal(err)
	}
	out := map[string]string{}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) >= 5 {
			out[f[2]] = f[1]
		}
	}
	return out
}

// has waits until the server's leases are those of exactly these addresses: it
// hears of a release after the container's end.
func (s *dnsmasq) has(tb testing.TB, want ...string) {
	tb.Helper()
	slices.Sort(want)
	eventually(tb, 5*time.Second, "the server's leases", func() error {
		var have []string
		for a := range s.leases(tb) {
			have = append(have, a)
		}
		slices.Sort(have)
		if !slices.Equal(have, want) {
			return fmt.Errorf("%v, want %v", have, want)
		}
		return nil
	})
}

// place is where a container is on one of its networks.
type place struct{ IPAddress, MacAddress, Gateway string }

// placeOf is what docker inspect says.
func (e *engine) placeOf(tb testing.TB, container, network string) place {
	tb.Helper()
	out := strings.Fields(e.must(tb, "inspect", "-f", fmt.Sprintf("{{with index .NetworkSettings.Networks %q}}{{.IPAddress}} {{.MacAddress}} {{.Gateway}}{{end}}", network), container))
	if len(out) < 2 {
		tb.Fatalf("%s has no address on %s: %q", container, network, out)
	}
	return place{out[0], out[1], strings.Join(out[2:], "")}
}

// leaseNetwork makes a network of ours whose addresses are leased on a link.
func (e *engine) leaseNetwork(tb testing.TB, name, link string, args ...string) {
	tb.Helper()
	e.oursNetwork(tb, name, append([]string{"--ipam-opt", "dhcp=" + link}, args...)...)
}

// weft runs the plugin's command against the running plugin.
func (e *engine) weft(tb testing.TB, args ...string) (string, error) {
	tb.Helper()
	out, err := output(e.inside(append([]string{suite.weft, args[0], "--socket", filepath.Join(e.state(tb), "admin.sock")}, args[1:]...)...))
	return strings.TrimSpace(out), err
}
