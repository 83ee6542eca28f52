//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The names under which the plugin is created, and the image of the probe.
const (
	pluginName = "weft"
	ours       = "weft:latest"
	builtin    = "bridge"
	image      = "weft-probe"
)

// engine is a dockerd on a machine.
type engine struct {
	*machine
	lan    *lan
	addrs  []string // of its card
	daemon *exec.Cmd
	client []string // docker command of the engine's version
	config map[string]any
	path   string // looked through for programs before all others
	plugin string // its name here, pluginName mostly
}

// newEngine makes a host on a LAN with an engine on it. config is added to
// its daemon.json.
func newEngine(tb testing.TB, config map[string]any) *engine {
	tb.Helper()
	return newEngineWith(tb, config, func(*engine) {})
}

// newEngineWith lets the caller change the engine before it starts.
func newEngineWith(tb testing.TB, config map[string]any, change func(*engine)) *engine {
	tb.Helper()
	return newLAN(tb).host(tb, "host", []string{host4 + "/24", host6 + "/64", second4 + "/24", second6 + "/64"}, config, change)
}

// host adds a host with an engine to the LAN. The first of addrs, IPv4, is the
// one that other hosts know it by.
func (l *lan) host(tb testing.TB, name string, addrs []string, config map[string]any, change func(*engine)) *engine {
	tb.Helper()
	return l.hostOf(tb, suite.version, name, addrs, config, change)
}

// hostOf is host with an engine of a version of its own.
func (l *lan) hostOf(tb testing.TB, v version, name string, addrs []string, config map[string]any, change func(*engine)) *engine {
	tb.Helper()
	e := &engine{lan: l, machine: newMachine(tb, name, v.root), addrs: addrs, client: v.client, config: map[string]any{}, plugin: pluginName}
	maps.Copy(e.config, v.config)
	maps.Copy(e.config, config)
	change(e)
	tb.Cleanup(func() {
		if tb.Failed() {
			e.printLog(tb)
		}
	})
	e.connect(tb)
	e.start(tb)
	if out, err := e.docker("import", "--change", `CMD ["/probe","serve","tcp:80","udp:53"]`, suite.image, image); err != nil {
		tb.Fatalf("import image: %v %s", err, out)
	}
	return e
}

// connect gives a freshly booted host its addresses.
func (e *engine) connect(tb testing.TB) {
	tb.Helper()
	e.lan.plug(tb, e.machine, e.addrs...)
}

func (e *engine) socket() string { return filepath.Join(e.dir, "d.sock") }
func (e *engine) data() string   { return filepath.Join(e.dir, "data") }
func (e *engine) log() string    { return filepath.Join(e.dir, "dockerd.log") }

// start runs dockerd and waits until it answers.
func (e *engine) start(tb testing.TB) {
	tb.Helper()
	conf, err := json.Marshal(e.config)
	if err != nil {
		tb.Fatal(err)
	}
	file := filepath.Join(e.dir, "daemon.json")
	if err := os.WriteFile(file, conf, 0o644); err != nil {
		tb.Fatal(err)
	}
	logFile, err := os.OpenFile(e.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = logFile.Close() }() // dockerd has its own copy
	_ = os.Remove(e.socket())
	e.daemon = e.inside("dockerd", "--config-file", file, "--data-root", e.data(), "--host", "unix://"+e.socket(),
		"--pidfile", filepath.Join(e.dir, "pid"), "--cgroup-parent", e.cgroup())
	e.daemon.Stdout, e.daemon.Stderr = logFile, logFile
	if e.path != "" {
		e.daemon.Env = append(os.Environ(), "PATH="+e.path+":"+os.Getenv("PATH"))
	}
	e.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := e.daemon.Start(); err != nil {
		tb.Fatal(err)
	}
	eventually(tb, 90*time.Second, "engine", e.ping)
}

// ping asks the engine's API without a docker process per attempt.
func (e *engine) ping() error {
	c := http.Client{Timeout: 2 * time.Second * suite.slow, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", e.socket())
	}}}
	r, err := c.Get("http://engine/_ping")
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }() // read to its end or of no use
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("ping: %s", r.Status)
	}
	return nil
}

// daemonPID is dockerd's process ID inside the machine.
func (e *engine) daemonPID(tb testing.TB) string {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(e.dir, "pid"))
	if err != nil {
		tb.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// kill sends SIGKILL to dockerd; stop ends it as a service manager would.
func (e *engine) kill(tb testing.TB) {
	tb.Helper()
	e.signalDaemon(tb, "KILL", 20*time.Second)
}

func (e *engine) stop(tb testing.TB) {
	tb.Helper()
	e.signalDaemon(tb, "TERM", 60*time.Second)
}

// signal is a command that sends a signal to a process of the host; a minimal
// Debian has no kill but the shell's.
func (e *engine) signal(name, pid string) *exec.Cmd {
	return e.inside("sh", "-c", "kill -"+name+" "+pid)
}

func (e *engine) signalDaemon(tb testing.TB, sig string, limit time.Duration) {
	tb.Helper()
	limit *= suite.slow
	if out, err := e.signal(sig, e.daemonPID(tb)).CombinedOutput(); err != nil {
		tb.Fatalf("kill -%s dockerd: %v %s", sig, err, out)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = e.daemon.Wait() // its exit status is the signal's
	}()
	select {
	case <-done:
	case <-time.After(limit):
		tb.Fatalf("dockerd still runs %v after SIG%s", limit, sig)
	}
	_ = os.Remove(filepath.Join(e.dir, "pid"))
}

// reboot kills every process of the host at once and boots it again with the
// files that it had.
func (e *engine) reboot(tb testing.TB) {
	tb.Helper()
	if err := e.off(); err != nil {
		tb.Fatal(err)
	}
	_ = e.daemon.Wait() // killed with the machine
	_ = os.Remove(filepath.Join(e.dir, "pid"))
	if out, err := output(e.lan.wire.inNet("ip", "link", "del", "p-"+e.name)); err != nil && !strings.Contains(err.Error(), "Cannot find") {
		tb.Fatalf("unplug: %v %s", err, out)
	}
	e.on(tb)
	e.connect(tb)
	e.start(tb)
}

// docker runs the CLI against this engine.
func (e *engine) docker(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute*suite.slow)
	defer cancel()
	all := slices.Concat(e.client[1:], []string{"-H", "unix://" + e.socket()}, args)
	c := exec.CommandContext(ctx, e.client[0], all...)
	c.Env = append(os.Environ(), "DOCKER_CONFIG="+e.dir, "DOCKER_CONTEXT=default")
	out, err := output(c)
	return strings.TrimSpace(out), err
}

// must is docker for commands that the test cannot go on without.
func (e *engine) must(tb testing.TB, args ...string) string {
	tb.Helper()
	out, err := e.docker(args...)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// run starts a container of the probe image; nothing in it needs to be asked
// to stop.
func (e *engine) run(tb testing.TB, name string, args ...string) {
	tb.Helper()
	if err := e.tryRun(name, args...); err != nil {
		tb.Fatalf("container %s: %v", name, err)
	}
}

func (e *engine) tryRun(name string, args ...string) error {
	all := slices.Concat([]string{"run", "-d", "--name", name, "--hostname", name, "--stop-signal", "KILL"}, args)
	if !slices.Contains(all, image) {
		all = append(all, image)
	}
	_, err := e.docker(all...)
	return err
}

// in is a command in a container's network and files, without the engine's
// 100 ms for an exec.
func (e *engine) in(container string, args ...string) (*exec.Cmd, error) {
	pid, err := e.docker("inspect", "-f", "{{.State.Pid}}", container)
	if err != nil {
		return nil, err
	}
	return e.enter(pid, args...), nil
}

// enter is a command in the namespaces of a process of this host. The first
// nsenter makes the host's /proc, which the process ID refers to, visible.
func (e *engine) enter(pid string, args ...string) *exec.Cmd {
	return e.inside(append([]string{"nsenter", "-t", pid, "-n", "-m", "-u", "--"}, args...)...)
}

// installPlugin creates and enables build/plugin as a managed plugin.
func (e *engine) installPlugin(tb testing.TB, settings ...string) {
	tb.Helper()
	needPlugin(tb)
	e.must(tb, "plugin", "create", e.plugin, e.bundle(tb))
	e.must(tb, append([]string{"plugin", "set", e.plugin, "LOG_LEVEL=debug"}, settings...)...)
	e.must(tb, "plugin", "enable", e.plugin)
}

// bundle is what the plugin is made of. The engine refuses files that another
// plugin was made of: for a second one they are made to differ, as the docs say.
func (e *engine) bundle(tb testing.TB) string {
	tb.Helper()
	if e.plugin == pluginName {
		return suite.bundle
	}
	dir := filepath.Join(e.dir, e.plugin)
	if _, err := output(exec.Command("cp", "-a", suite.bundle, dir)); err != nil {
		tb.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(dir, "rootfs/weft"), time.Time{}, time.Now()); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// needPlugin fails a test of ours when there is no bundle to test.
func needPlugin(tb testing.TB) {
	tb.Helper()
	if _, err := os.Stat(filepath.Join(suite.bundle, "config.json")); err != nil {
		tb.Fatalf("no plugin bundle: %v (run \"make plugin\")", err)
	}
}

func (e *engine) pluginID(tb testing.TB) string {
	tb.Helper()
	return e.must(tb, "plugin", "inspect", "-f", "{{.ID}}", e.plugin)
}

// state is the plugin's propagated mount as this machine sees it.
func (e *engine) state(tb testing.TB) string {
	tb.Helper()
	return filepath.Join(e.data(), "plugins", e.pluginID(tb), "propagated-mount")
}

// pluginPID is the plugin's process ID inside the machine, "" while there is
// none.
func (e *engine) pluginPID(tb testing.TB) string {
	tb.Helper()
	files, err := output(e.inside("sh", "-c", "cat /run/docker/runtime-runc/plugins.moby/"+e.pluginID(tb)+"/state.json"))
	if err != nil {
		return ""
	}
	var s struct {
		PID int `json:"init_process_pid"`
	}
	if err := json.Unmarshal([]byte(files), &s); err != nil || s.PID == 0 {
		return ""
	}
	return fmt.Sprint(s.PID)
}

// pluginLog is what the plugin wrote, one entry a line, from the daemon's log.
func (e *engine) pluginLog(tb testing.TB) []string {
	tb.Helper()
	b, err := os.ReadFile(e.log())
	if err != nil {
		tb.Fatal(err)
	}
	var lines []string
	tag := "plugin=" + e.pluginID(tb)
	for l := range strings.SplitSeq(string(b), "\n") {
		if strings.Contains(l, tag) {
			lines = append(lines, l)
		}
	}
	return lines
}

// printLog shows the end of the daemon's log with a failed test.
func (e *engine) printLog(tb testing.TB) {
	tb.Helper()
	b, err := os.ReadFile(e.log())
	if err != nil {
		tb.Logf("daemon log: %v", err)
		return
	}
	var lines []string
	for l := range strings.SplitSeq(string(b), "\n") {
		noise := strings.Contains(l, "cleaning up after shim") || strings.Contains(l, "cleanup warnings")
		if !noise && strings.Contains(l, "plugin=") || strings.Contains(l, "level=error") || !noise && strings.Contains(l, "level=warning") {
			lines = append(lines, l)
		}
	}
	tb.Logf("end of the daemon's log:\n%s", strings.Join(lines[max(0, len(lines)-40):], "\n"))
	if keep := os.Getenv("E2E_LOGS"); keep != "" {
		name := strings.ReplaceAll(tb.Name(), "/", "_") + ".log"
		if err := os.WriteFile(filepath.Join(keep, name), b, 0o644); err != nil {
			tb.Log(err)
		}
	}
}
