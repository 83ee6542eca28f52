package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/netnstest"
)

// TestForgetNetwork: the engine removed a network while the plugin was not there;
// the error about its subnet says how to get it back.
func TestForgetNetwork(t *testing.T) {
	netnstest.Enter(t)
	p := serveIn(t)
	const id = "1a2b3c4d5e6f1a2b3c4d5e6f1a2b3c4d5e6f1a2b3c4d5e6f1a2b3c4d5e6f1a2b"
	pool := `{"AddressSpace":"weft-local","Pool":"10.7.0.0/24"}`
	network := func(id string) string {
		return fmt.Sprintf(`{"NetworkID":%q,"Options":{},"IPv4Data":[{"Pool":"10.7.0.0/24","Gateway":"10.7.0.1/24"}]}`, id)
	}
	p.must(t, "IpamDriver.RequestPool", pool)
	p.must(t, "NetworkDriver.CreateNetwork", network(id))
	p.stop(t)
	cmd := exec.Command(os.Args[0], "serve", "--socket", p.dir+"/p.sock", "--state", p.dir)
	cmd.Env = append(os.Environ(), asMain+"=1")
	p = startCmd(t, p.dir, cmd)
	status, m := p.call(t, "IpamDriver.RequestPool", pool)
	command := "weft network forget " + id[:12]
	if text := fmt.Sprint(m["Err"]); status != 500 || !strings.Contains(text, command) {
		t.Fatalf("%d %v, want it to name %q", status, m, command)
	}
	socket := filepath.Join(p.dir, adminSocket)
	for what, want := range map[string]string{"nothing-like-it": "weft status networks"} {
		if code, _, errs := weft(t, t.TempDir(), "network", "forget", what, "-socket", socket); code != 1 || !strings.Contains(errs, want) {
			t.Errorf("forget %s: exit %d, %s", what, code, errs)
		}
	}
	if code, out, errs := weft(t, t.TempDir(), "network", "forget", id[:12], "-socket", socket); code != 0 || !strings.Contains(out, id[:12]) {
		t.Fatalf("exit %d, %s%s", code, out, errs)
	}
	p.must(t, "IpamDriver.RequestPool", pool)
	p.must(t, "NetworkDriver.CreateNetwork", network(strings.Repeat("5", 64)))
	if code, out, errs := weft(t, t.TempDir(), "network", "forget", "unclaimed", "-socket", socket); code != 0 || !strings.Contains(out, "nothing is unclaimed") {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	p.stop(t)
}

// TestForgetOneOfTwo: of two networks of a LAN that have the same subnet one is
// forgotten; the other's addresses stay taken.
func TestForgetOneOfTwo(t *testing.T) {
	ns := netnstest.Enter(t)
	ns.Exec("sh", "-ec", "ip link add lan0 type bridge; ip link set lan0 up")
	p := serveIn(t)
	const mine, others = "aa", "bb" // weft hands out addresses for the one, another driver for the other
	p.must(t, "IpamDriver.RequestPool", `{"AddressSpace":"weft-local","Pool":"10.7.0.0/24"}`)
	p.must(t, "IpamDriver.RequestAddress", `{"PoolID":"weft-local,10.7.0.0/24","Address":"10.7.0.9"}`)
	for n, digits := range []string{mine, others} {
		p.must(t, "NetworkDriver.CreateNetwork", fmt.Sprintf(`{"NetworkID":%q,"Options":{"com.docker.network.generic":{"mode":"macvlan","parent":"lan0"}},`+
			`"IPv4Data":[{"Pool":"10.7.0.0/24","Gateway":"10.7.0.%d/24"}]}`, strings.Repeat(digits, 32), n+1))
	}
	forget := func(digits, want string) {
		t.Helper()
		if code, out, errs := weft(t, t.TempDir(), "network", "forget", digits, "-socket", filepath.Join(p.dir, adminSocket)); code != 0 || !strings.Contains(out, want) {
			t.Errorf("forget %s: exit %d, %s%s; want %q", digits, code, out, errs, want)
		}
	}
	forget(others, "addresses of 10.7.0.0/24 stay taken, because another network has that subnet")
	if d := p.status(t); len(d.Pools) != 1 || d.Pools[0].Used != 1 {
		t.Errorf("pools %+v, want the one of the network that is left", d.Pools)
	}
	forget(mine, "is forgotten")
	if d := p.status(t); len(d.Pools) != 0 {
		t.Errorf("left %+v", d.Pools)
	}
	p.stop(t)
}

// TestUninstall removes what a plugin left that is gone, and nothing while one runs.
func TestUninstall(t *testing.T) {
	ns := netnstest.Enter(t)
	ns.Exec("sh", "-ec", "sysctl -qw net.ipv4.ip_forward=0; iptables-nft -P FORWARD DROP; ip link add br0 type bridge")
	left := func() string {
		return ns.Exec("sh", "-c", "ip -o link | cut -d: -f2; nft list tables | grep weft; iptables-nft -S FORWARD; true")
	}
	before := left()
	p := serveIn(t)
	p.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"n1","Options":{},"IPv4Data":[{"Pool":"10.7.0.0/24","Gateway":"10.7.0.1/24"}]}`)
	p.must(t, "NetworkDriver.CreateEndpoint", `{"NetworkID":"n1","EndpointID":"e1","Interface":{"Address":"10.7.0.2/24"}}`)
	other := serveIn(t, "-instance", "lab")
	other.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"n2","Options":{},"IPv4Data":[{"Pool":"10.8.0.0/24","Gateway":"10.8.0.1/24"}]}`)
	running := left()
	if code, _, errs := weft(t, t.TempDir(), "uninstall"); code != 1 || !strings.Contains(errs, "docker plugin rm -f") {
		t.Errorf("beside its plugin: exit %d, %s", code, errs)
	}
	if left() != running {
		t.Error("it removed something all the same")
	}
	_ = p.Process.Kill()
	<-p.ended
	if code, out, errs := weft(t, t.TempDir(), "uninstall"); code != 0 || !strings.Contains(out, "removed: link add wfb") || !strings.Contains(out, "nothing of instance local is left") ||
		!strings.Contains(out, "removed: nft table inet weft\n") || !strings.Contains(out, "removed: iptables-nft FORWARD ") {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	for _, name := range []string{"local", "nosuch"} {
		code, out, errs := weft(t, t.TempDir(), "uninstall", "-instance", name)
		if want := "nothing of instance " + name + " on this host, but there is of instance lab:"; code != 1 || out != "" || !strings.Contains(errs, want) {
			t.Errorf("%s: exit %d, %s%s", name, code, out, errs)
		}
	}
	if got := left(); strings.Contains(got, "table inet weft\n") || !strings.Contains(got, "weft_lab") || !strings.Contains(got, "wfb") {
		t.Errorf("the other instance was touched, or this one was not removed:\n%s", got)
	}
	_ = other.Process.Kill()
	<-other.ended
	for _, want := range []string{"removed: nft table inet weft_lab\n", "there is nothing of instance lab on this host\n"} {
		if code, out, errs := weft(t, t.TempDir(), "uninstall", "-instance", "lab"); code != 0 || !strings.Contains(out, want) || strings.HasPrefix(want, "there") && out != want {
			t.Errorf("exit %d, %s%s; want %q", code, out, errs, want)
		}
	}
	if got := left(); got != before {
		t.Errorf("left:\n%s\nwant:\n%s", got, before)
	}
	if code, _, errs := weft(t, t.TempDir(), "uninstall", "now"); code != 2 || !strings.Contains(errs, "now") {
		t.Errorf("exit %d, %s", code, errs)
	}
}
