//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// oursNetwork makes a network of ours.
func (e *engine) oursNetwork(tb testing.TB, name string, args ...string) {
	tb.Helper()
	all := slices.Concat([]string{"network", "create", "-d", ours, "--ipam-driver", ours}, args, []string{name})
	e.must(tb, all...)
}

// sees dials from the client and fails unless the wanted container answers
// and saw the wanted address.
func (e *engine) sees(tb testing.TB, m *machine, to, want string) {
	tb.Helper()
	out, err := output(m.inNet(suite.probe, "dial", "-timeout", "1500ms", "-wait", "5s", "tcp", to))
	if err != nil {
		tb.Fatal(err)
	}
	if !strings.Contains(out, fmt.Sprintf("%q", want)) {
		tb.Errorf("%s from %s: %s, want %s", to, m.name, strings.TrimSpace(out), want)
	}
}

// killPlugin ends the plugin's process as a crash would.
func (e *engine) killPlugin(tb testing.TB) {
	tb.Helper()
	eventually(tb, 10*time.Second, "kill the plugin", func() error {
		pid := e.pluginPID(tb)
		if pid == "" {
			return errors.New("it has no process")
		}
		_, err := output(e.signal("KILL", pid))
		return err
	})
}

// waitPlugin waits until the plugin serves calls.
func (e *engine) waitPlugin(tb testing.TB) {
	tb.Helper()
	eventually(tb, 20*time.Second, "plugin serves", func() error {
		s, err := e.status(tb)
		if err == nil && s.Phase != "serving" {
			err = fmt.Errorf("phase %q: %s", s.Phase, s.Error)
		}
		return err
	})
}

// removeAll removes every container and network of ours.
func (e *engine) removeAll(tb testing.TB) {
	tb.Helper()
	if ids := strings.Fields(e.must(tb, "ps", "-aq")); len(ids) > 0 {
		e.must(tb, append([]string{"rm", "-f"}, ids...)...)
	}
	if err := e.removeNetworks(tb, strings.Fields(e.must(tb, "network", "ls", "-q", "--filter", "driver="+ours))); err != nil {
		tb.Fatal(err)
	}
}

// removeNetworks removes networks that nothing uses. Engine 20.10 miscounts
// endpoints that go at the same moment, with its own driver too; a restart
// counts them again.
func (e *engine) removeNetworks(tb testing.TB, names []string) error {
	tb.Helper()
	if len(names) == 0 {
		return nil
	}
	_, err := e.docker(append([]string{"network", "rm"}, names...)...)
	if err == nil || suite.version.major >= 28 || !strings.Contains(err.Error(), "has active endpoints") {
		return err
	}
	note("%s: the engine lost count of a network's endpoints", tb.Name())
	e.stop(tb)
	e.start(tb)
	var left []string
	for _, n := range names {
		if _, err := e.docker("network", "inspect", n); err == nil {
			left = append(left, n)
		}
	}
	_, err = e.docker(append([]string{"network", "rm"}, left...)...)
	return err
}

// TestPluginKilled kills the plugin's process again and again while
// containers start and stop, 200 times in all.
func TestPluginKilled(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.oursNetwork(t, "net1", "--subnet", net1)
	for _, name := range e.killUnderLoad(t, 200, "--network", "net1", "-p", "80") {
		addr := e.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.net1.IPAddress}}", name)
		e.sees(t, e.machine, addr+":80", name)
		port, err := e.oursPort(t, addr, 80)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		e.sees(t, e.lan.client, fmt.Sprintf("%s:%d", host4, port), client4)
	}
	e.removeAll(t)
	// An endpoint that was being made when its plugin died is unknown to the
	// engine; the plugin gives it a minute before it takes it for lost.
	start := time.Now()
	e.checkCleanIn(t, 100*time.Second)
	note("plugin killed: clean %v after the last container", time.Since(start).Round(time.Second))
}

// killUnderLoad starts and stops containers, total times in all, and kills the
// plugin every now and then. It returns the containers that run.
func (e *engine) killUnderLoad(t *testing.T, total int, args ...string) (running []string) {
	t.Helper()
	const workers = 4
	var left, failed, strange atomic.Int64
	left.Store(int64(total))
	stop := make(chan struct{})
	var killer, wg sync.WaitGroup
	kills := 0
	killer.Go(func() {
		for {
			// Killed again before it was registered again, the engine would
			// take it for a crash loop and disable it.
			select {
			case <-stop:
				return
			case <-time.After(3*time.Second + time.Duration(rand.IntN(2000))*time.Millisecond):
			}
			e.killPlugin(t)
			kills++
		}
	})
	for w := range workers {
		wg.Go(func() {
			var up []string
			for n := 0; left.Add(-1) >= 0; n++ {
				if len(up) == 0 || len(up) < 6 && rand.IntN(2) == 0 {
					name := fmt.Sprintf("w%d-%d", w, n)
					if err := e.tryRun(name, args...); err != nil {
						if n := failed.Add(1); n <= 10 {
							t.Logf("start: %s", lastLine(err))
						}
						if !cutOff(err) {
							strange.Add(1)
						}
						continue
					}
					up = append(up, name)
					continue
				}
				i := rand.IntN(len(up))
				if _, err := e.docker("rm", "-f", up[i]); err != nil {
					t.Errorf("stop: %v", err)
				}
				up = slices.Delete(up, i, i+1)
			}
		})
	}
	wg.Wait()
	close(stop)
	killer.Wait()
	e.waitPlugin(t)
	running = strings.Fields(e.must(t, "ps", "--format", "{{.Names}}"))
	note("%s: plugin killed %d times during %d container starts and stops: %d starts failed, %d containers run", t.Name(), kills, total, failed.Load(), len(running))
	if n := strange.Load(); n > 0 {
		t.Errorf("%d starts failed for other reasons than a request that was cut off", n)
	}
	if kills == 0 || len(running) == 0 {
		t.Errorf("%d kills, %d running containers: nothing was tested", kills, len(running))
	}
	return running
}

// cutOff reports whether a start failed because its request was under way
// when the plugin died: the engine sends it again without its body.
func cutOff(err error) bool {
	for _, s := range []string{"body is empty", "connection reset", "connection refused", "EOF", "broken pipe"} {
		if strings.Contains(err.Error(), s) {
			return true
		}
	}
	return false
}

// threeContainers starts what the restart tests look at: one that comes back
// by itself, one that is started again, and a port each.
func threeContainers(t *testing.T, e *engine) {
	t.Helper()
	e.oursNetwork(t, "net1", "--subnet", net1, "--ipv6", "--subnet", net1v6)
	e.run(t, "always", "--network", "net1", "--restart", "always", "-p", "8080:80")
	e.run(t, "again", "--network", "net1", "-p", "8081:80")
	e.run(t, "fixed", "--network", "net1", "--restart", "always", "--ip", "10.201.0.77", "-p", "8082:80/tcp")
}

// checkThree looks at them after they should be up.
func checkThree(t *testing.T, e *engine) {
	t.Helper()
	e.sees(t, e.lan.client, host4+":8080", client4)
	e.sees(t, e.lan.client, "["+host6+"]:8080", client6)
	e.sees(t, e.lan.client, host4+":8082", client4)
	e.sees(t, e.machine, "10.201.0.77:80", "fixed")
	c, err := e.in("always", "/probe", "dial", "-wait", "3s", "tcp", "fixed:80")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := output(c); err != nil || !strings.Contains(out, `"fixed"`) {
		t.Errorf("always to fixed by name: %s %v", out, err)
	}
	if out := e.must(t, "ps", "-q", "--filter", "name=again"); out == "" {
		e.must(t, "start", "again")
	}
	e.sees(t, e.lan.client, host4+":8081", client4)
	e.checkAgrees(t)
}

// TestEngineKilled kills dockerd and starts it again.
func TestEngineKilled(t *testing.T) {
	for _, live := range []bool{false, true} {
		t.Run(fmt.Sprintf("live-restore=%t", live), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t, map[string]any{"live-restore": live})
			e.installPlugin(t)
			threeContainers(t, e)
			checkThree(t, e)
			var s *streamer
			if live {
				s = startStream(t, e.lan.client, host4+":8080")
			}
			e.kill(t)
			time.Sleep(time.Second)
			e.start(t)
			e.waitPlugin(t)
			checkThree(t, e)
			if live {
				s.finish(t, "engine killed with live-restore")
			}
			e.must(t, "restart", "-t", "0", "always")
			checkThree(t, e)
			e.removeAll(t)
			e.checkClean(t)
		})
	}
}

// TestReboot kills everything at once and boots: no link, no process, no
// table, but the files.
func TestReboot(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	threeContainers(t, e)
	checkThree(t, e)
	for range 2 {
		e.reboot(t)
		e.waitPlugin(t)
		checkThree(t, e)
	}
	e.removeAll(t)
	e.checkClean(t)
}

// TestEngineStopped is a service restart: every container is stopped in
// order, then the plugin.
func TestEngineStopped(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	threeContainers(t, e)
	e.stop(t)
	for _, l := range e.links(t) {
		if strings.HasPrefix(l.Name, "wfv") {
			t.Errorf("the engine stopped every container, but link %s is there", l.Name)
		}
	}
	e.start(t)
	e.waitPlugin(t)
	checkThree(t, e)
	e.removeAll(t)
	e.checkClean(t)
}

// streamer keeps a connection to a server busy.
type streamer struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *strings.Builder
}

func startStream(tb testing.TB, m *machine, to string) *streamer {
	tb.Helper()
	return startUntilClosed(tb, m.inNet(suite.probe, "stream", to))
}

// startUntilClosed starts a command of the probe that goes on until its input
// ends.
func startUntilClosed(tb testing.TB, c *exec.Cmd) *streamer {
	tb.Helper()
	s := &streamer{cmd: c, out: &strings.Builder{}}
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := s.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		// It may be in another process namespace than nsenter, which is then not
		// replaced by it, and keeps its output open until it has ended.
		_ = s.in.Close()
		end(s.cmd)
	})
	return s
}

// finish fails when the connection broke, or stood still for a second.
func (s *streamer) finish(tb testing.TB, what string) {
	tb.Helper()
	_ = s.in.Close()
	if err := s.cmd.Wait(); err != nil {
		tb.Errorf("%s: connection broke: %v %s", what, err, s.out)
		return
	}
	var answers, longest int
	if _, err := fmt.Sscan(s.out.String(), &answers, &longest); err != nil || answers == 0 {
		tb.Errorf("%s: connection said %q", what, s.out)
	}
	note("%s: %d answers on one connection meanwhile, the slowest after %d ms", what, answers, longest)
	if longest > 1000 {
		tb.Errorf("%s: traffic stood still for %d ms", what, longest)
	}
}

// TestPluginDisabled disables and enables the plugin under running traffic.
func TestPluginDisabled(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	threeContainers(t, e)
	s := startStream(t, e.lan.client, host4+":8080")
	e.must(t, "plugin", "disable", "-f", pluginName)
	time.Sleep(2 * time.Second)
	// New connections, too, while nobody is there.
	e.sees(t, e.lan.client, host4+":8082", client4)
	e.must(t, "plugin", "enable", pluginName)
	e.waitPlugin(t)
	checkThree(t, e)
	e.killPlugin(t)
	e.waitPlugin(t)
	time.Sleep(time.Second) // the engine registers it again
	checkThree(t, e)
	s.finish(t, "plugin disabled, enabled and killed")
	e.run(t, "after", "--network", "net1", "-p", "8083:80")
	e.sees(t, e.lan.client, host4+":8083", client4)
	e.must(t, "rm", "-f", "after")
	e.loseState(t)
	e.forgetNetwork(t)
	e.checkClean(t)
	e.uninstall(t)
}

// loseState removes the plugin by force under running containers and installs it
// again.
func (e *engine) loseState(t *testing.T) {
	t.Helper()
	e.must(t, "plugin", "rm", "-f", pluginName)
	e.installPlugin(t)
	e.waitPlugin(t)
	for _, to := range []string{host4 + ":8080", host4 + ":8081", host4 + ":8082"} {
		e.sees(t, e.lan.client, to, client4)
	}
	e.sees(t, e.lan.client, "["+host6+"]:8080", client6)
	if s, err := e.status(t); err != nil || len(s.Unclaimed) == 0 || s.Drift.Error != "" {
		t.Errorf("status: %v, unclaimed %q, %s", err, s.Unclaimed, s.Drift.Error)
	}
	if out, err := e.docker("restart", "-t", "0", "again"); err == nil || !strings.Contains(err.Error(), "docker network rm") {
		t.Errorf("restart of a container on a network that the plugin does not know: %s %v", out, err)
	}
	e.sees(t, e.lan.client, host4+":8080", client4)
	e.must(t, "rm", "-f", "always", "again", "fixed")
	e.must(t, "network", "rm", "net1")
	e.checkClean(t)
	threeContainers(t, e)
	checkThree(t, e)
	e.removeAll(t)
}

// forgetNetwork has the engine remove a network while the plugin is not there.
func (e *engine) forgetNetwork(t *testing.T) {
	t.Helper()
	e.oursNetwork(t, "net1", "--subnet", net1)
	e.must(t, "plugin", "disable", "-f", pluginName)
	e.must(t, "network", "rm", "net1")
	e.must(t, "plugin", "enable", pluginName)
	e.waitPlugin(t)
	_, err := e.docker("network", "create", "-d", ours, "--ipam-driver", ours, "--subnet", net1, "net1")
	m := regexp.MustCompile("weft network forget ([0-9a-f]+)").FindStringSubmatch(fmt.Sprint(err))
	if m == nil {
		t.Fatalf("the error names no command: %v", err)
	}
	if out, err := e.weft(t, "network", "forget", m[1]); err != nil {
		t.Fatalf("forget: %s %v", out, err)
	}
	e.oursNetwork(t, "net1", "--subnet", net1)
	e.removeAll(t)
}

// uninstall is the plugin removed by force with a network, and what the
// documentation says to do then.
func (e *engine) uninstall(t *testing.T) {
	t.Helper()
	e.oursNetwork(t, "net1", "--subnet", net1)
	e.must(t, "plugin", "rm", "-f", pluginName)
	if out, err := output(e.inside(suite.weft, "uninstall")); err != nil {
		t.Fatalf("uninstall: %s %v", out, err)
	}
	left := e.net(t, "nft", "list", "tables") + e.net(t, "iptables", "-S", "FORWARD") + e.net(t, "ip", "-o", "link")
	if strings.Contains(left, "weft") || strings.Contains(left, "wfb") {
		t.Errorf("left behind:\n%s", left)
	}
}

// TestDiskFull fills the plugin's disk up and frees it again.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	needPlugin(t)
	e.must(t, "plugin", "create", pluginName, suite.bundle)
	state := e.state(t)
	if out, err := e.inside("sh", "-c", "mkdir -p "+state+" && mount -t tmpfs -o size=2m tmpfs "+state).CombinedOutput(); err != nil {
		t.Fatalf("small disk: %v %s", err, out)
	}
	e.must(t, "plugin", "enable", pluginName)
	e.oursNetwork(t, "net1", "--subnet", net1)
	e.run(t, "before", "--network", "net1", "-p", "8080:80")
	fill := filepath.Join(state, "fill")
	if out, err := e.inside("sh", "-c", "dd if=/dev/zero bs=4k of="+fill+" 2>/dev/null; true").CombinedOutput(); err != nil {
		t.Fatalf("fill: %v %s", err, out)
	}
	// The database reuses the pages that it has for a while.
	var refusedBy error
	made := 0
	for ; made < 150 && refusedBy == nil; made++ {
		start := time.Now()
		_, refusedBy = e.docker("network", "create", "-d", ours, "--ipam-driver", ours, fmt.Sprintf("full%d", made))
		if d := time.Since(start); d > 12*time.Second {
			t.Errorf("a full disk took %v to answer", d)
		}
	}
	if refusedBy == nil {
		t.Errorf("%d networks were made on a full disk", made)
	} else if !strings.Contains(refusedBy.Error(), "no space left") {
		t.Errorf("the error does not say what is wrong: %v", refusedBy)
	}
	note("disk full: refused after %d networks: %v", made-1, lastLine(refusedBy))
	e.sees(t, e.lan.client, host4+":8080", client4)
	e.must(t, "rm", "-f", "before") // removing must work, whatever the disk says
	if out, err := e.inside("rm", fill).CombinedOutput(); err != nil {
		t.Fatalf("free: %v %s", err, out)
	}
	e.oursNetwork(t, "net2", "--subnet", net2)
	e.run(t, "later", "--network", "net2", "-p", "8080:80")
	e.sees(t, e.lan.client, host4+":8080", client4)
	e.removeAll(t)
	e.checkCleanIn(t, 40*time.Second)
}

func lastLine(err error) string {
	if err == nil {
		return ""
	}
	s := err.Error()
	return s[strings.LastIndex(s, "exit status"):]
}

// TestDamagedDatabase damages each database: it is refused with a message and
// not touched; with the old file everything works again.
func TestDamagedDatabase(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	threeContainers(t, e)
	e.must(t, "plugin", "disable", "-f", pluginName)
	file := filepath.Join(e.state(t), "weft.db")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	damages := map[string]func([]byte) []byte{
		"first pages overwritten": func(b []byte) []byte { return append(slices.Repeat([]byte("garbage!"), 1024), b[8192:]...) },
		"cut short":               func(b []byte) []byte { return b[:8192+100] },
		"middle overwritten": func(b []byte) []byte {
			copy(b[8192:], slices.Repeat([]byte{0xa5}, len(b)-8192))
			return b
		},
	}
	for name, damage := range damages {
		bad := damage(slices.Clone(good))
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		e.must(t, "plugin", "enable", pluginName) // it serves, with errors
		_, err := e.docker("network", "create", "-d", ours, "--ipam-driver", ours, "refused")
		switch {
		case err == nil:
			t.Errorf("%s: a network was made", name)
		case !strings.Contains(err.Error(), "weft.db") || !strings.Contains(err.Error(), "damaged"):
			t.Errorf("%s: the error does not name what is wrong: %v", name, err)
		}
		note("database, %s: %s", name, lastLine(err))
		// The data plane has to go on without its records.
		e.sees(t, e.lan.client, host4+":8080", client4)
		e.must(t, "plugin", "disable", "-f", pluginName)
		after, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(bad, after) {
			t.Errorf("%s: the damaged file was changed", name)
		}
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	e.must(t, "plugin", "enable", pluginName)
	e.waitPlugin(t)
	checkThree(t, e)
	e.removeAll(t)
	e.checkClean(t)
}

// TestStrandedEndpoint has an endpoint that the plugin made just before it
// died, and of which the engine therefore knows nothing: it gives the address
// to the next container, which has to start.
func TestStrandedEndpoint(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.oursNetwork(t, "net1", "--subnet", net1)
	// A short way to the plugin's socket, whose path is too long for connect.
	short := filepath.Join(suite.dir, "p-"+filepath.Base(e.dir))
	if err := os.Symlink("/proc/"+e.pid()+"/root/run/docker/plugins/"+e.pluginID(t), short); err != nil {
		t.Fatal(err)
	}
	body := fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":"10.201.0.50/24"},"Options":{}}`,
		e.must(t, "network", "inspect", "-f", "{{.Id}}", "net1"), strings.Repeat("5d", 32))
	if err := post(filepath.Join(short, "weft.sock"), "/NetworkDriver.CreateEndpoint", body); err != nil {
		t.Fatal(err)
	}
	e.killPlugin(t)
	e.waitPlugin(t)
	time.Sleep(time.Second) // the engine registers it again
	start := time.Now()
	if err := e.tryRun("alpha", "--network", "net1", "--ip", "10.201.0.50"); err != nil {
		t.Errorf("its address is held by an endpoint that the engine never knew: %s", lastLine(err))
	} else {
		e.sees(t, e.machine, "10.201.0.50:80", "alpha")
	}
	note("stranded endpoint: its address was given again after %v", time.Since(start).Round(10*time.Millisecond))
	e.removeAll(t)
	e.checkClean(t)
}
