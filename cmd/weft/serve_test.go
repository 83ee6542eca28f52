package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/store"
)

// asMain makes the test's own binary the command, so that a process of it can
// be started, killed and measured.
const asMain = "WEFT_TEST_AS_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		main()
		return
	}
	flag.Parse()
	// Tests that run beside each other wait for leases to end, and hardly work: more
	// of them at a time than there are processors, unless somebody says otherwise.
	if parallel := flag.Lookup("test.parallel").Value; parallel.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		_ = parallel.Set("8")
	}
	os.Exit(m.Run())
}

// process is `weft serve` in a network namespace of its own.
type process struct {
	*exec.Cmd
	dir    string
	client *http.Client
	ended  chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

// Write keeps what the process says.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func start(tb testing.TB, dir string, env ...string) *process {
	tb.Helper()
	cmd := exec.Command(os.Args[0], "serve", "--socket", dir+"/p.sock", "--state", dir)
	cmd.Env = append(os.Environ(), append(env, asMain+"=1")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return startCmd(tb, dir, cmd)
}

func startCmd(tb testing.TB, dir string, cmd *exec.Cmd) *process {
	tb.Helper()
	p := &process{Cmd: cmd, dir: dir, ended: make(chan struct{})}
	p.Stdout, p.Stderr = p, p
	if err := p.Start(); err != nil {
		tb.Fatalf("start weft in a network namespace: %v", err)
	}
	go func() {
		_ = p.Wait() // the state is looked at
		close(p.ended)
	}()
	p.client = &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", dir+"/p.sock")
		},
	}}
	tb.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.ended
		if tb.Failed() {
			tb.Logf("weft said:\n%s", p.said())
		}
	})
	for range 300 {
		conn, err := net.Dial("unix", dir+"/p.sock")
		if err == nil {
			_ = conn.Close()
			return p
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatal("weft does not listen")
	return nil
}

// call makes one call of the engine and decodes its answer.
func (p *process) call(tb testing.TB, method, body string) (int, map[string]any) {
	tb.Helper()
	resp, err := p.client.Post("http://weft/"+method, "", strings.NewReader(body))
	if err != nil {
		tb.Fatalf("%s: %v", method, err)
	}
	defer func() { _ = resp.Body.Close() }()
	m, err := decoded(resp.Body)
	if err != nil {
		tb.Fatalf("%s: %v", method, err)
	}
	return resp.StatusCode, m
}

// decoded is an answer.
func decoded(r io.Reader) (m map[string]any, err error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%q: %w", b, err)
	}
	return m, nil
}

// must is call for those that have to succeed.
func (p *process) must(tb testing.TB, method, body string) map[string]any {
	tb.Helper()
	status, m := p.call(tb, method, body)
	if status != 200 {
		tb.Fatalf("%s %s: %d %v", method, body, status, m)
	}
	return m
}

func (p *process) status(tb testing.TB) document {
	tb.Helper()
	var d document
	var err error
	for range 100 { // its socket comes after the engine's
		if err = admin.Get(tb.Context(), filepath.Join(p.dir, adminSocket), admin.PathStatus, &d); err == nil {
			return d
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatal(err)
	return d
}

// stop asks the process to end and returns how long it took.
func (p *process) stop(t *testing.T) time.Duration {
	t.Helper()
	begin := time.Now()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.ended:
	case <-time.After(12 * time.Second):
		t.Fatal("weft does not stop")
	}
	if code := p.ProcessState.ExitCode(); code != 0 {
		t.Errorf("weft exited with %d", code)
	}
	return time.Since(begin)
}

const (
	netID = "f00df00df00df00df00df00df00df00df00df00df00df00df00df00df00df00d"
	epID  = "cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe"
)

func TestServe(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir)
	if got := p.must(t, "Plugin.Activate", ""); fmt.Sprint(got["Implements"]) != "[NetworkDriver IpamDriver]" {
		t.Errorf("Activate: %v", got)
	}
	if got := p.must(t, "NetworkDriver.GetCapabilities", ""); got["Scope"] != "local" {
		t.Errorf("capabilities: %v", got)
	}
	space := p.must(t, "IpamDriver.GetDefaultAddressSpaces", "")["LocalDefaultAddressSpace"]
	pool := p.must(t, "IpamDriver.RequestPool", fmt.Sprintf(`{"AddressSpace":%q,"Pool":"10.99.0.0/24","SubPool":"","Options":null,"V6":false}`, space))
	if addr := p.must(t, "IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":"10.99.0.2","Options":null}`, pool["PoolID"])); addr["Address"] != "10.99.0.2/24" {
		t.Errorf("RequestAddress: %v", addr)
	}
	p.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{}},`+
		`"IPv4Data":[{"AddressSpace":"l","Pool":"10.99.0.0/24","Gateway":"10.99.0.1/24"}],"IPv6Data":[]}`)
	p.must(t, "NetworkDriver.CreateEndpoint", `{"NetworkID":"`+netID+`","EndpointID":"`+epID+`","Interface":{"Address":"10.99.0.2/24"},"Options":{}}`)
	join := p.must(t, "NetworkDriver.Join", `{"NetworkID":"`+netID+`","EndpointID":"`+epID+`","SandboxKey":"/x","Options":{}}`)
	if join["Gateway"] != "10.99.0.1" {
		t.Errorf("Join: %v", join)
	}
	d := p.status(t)
	if d.Phase != serving || len(d.Networks) != 1 || d.Networks[0].ID != netID || len(d.Endpoints) != 1 || len(d.Pools) != 1 || d.Pools[0].Used == 0 {
		t.Errorf("status: %+v", d)
	}
	if took := p.stop(t); took > 3*time.Second {
		t.Errorf("an idle plugin took %v to stop", took)
	}
	for _, s := range []string{"p.sock", adminSocket} {
		if _, err := os.Lstat(filepath.Join(dir, s)); !os.IsNotExist(err) {
			t.Errorf("%s after stop: %v", s, err)
		}
	}
}

// A kill leaves its sockets behind and the files locked for an instant.
func TestServeAfterKill(t *testing.T) {
	dir := t.TempDir()
	first := start(t, dir)
	first.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{}},`+
		`"IPv4Data":[{"AddressSpace":"l","Pool":"10.99.0.0/24","Gateway":"10.99.0.1/24"}],"IPv6Data":[]}`)
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-first.ended
	second := start(t, dir)
	second.must(t, "NetworkDriver.EndpointOperInfo", `{"NetworkID":"`+netID+`","EndpointID":"`+epID+`"}`)
	if d := second.status(t); d.Phase != serving || len(d.Networks) != 1 {
		t.Errorf("status: %+v", d)
	}
	second.stop(t)
}

// Nothing that is wrong with the state ends the process; once it is mended,
// calls are served.
func TestServeDamagedDatabase(t *testing.T) {
	dir := t.TempDir()
	db := filepath.Join(dir, "weft.db")
	damaged := bytes.Repeat([]byte("not a database. "), 4096)
	if err := os.WriteFile(db, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, dir)
	p.must(t, "NetworkDriver.GetCapabilities", "")
	status, m := p.call(t, "NetworkDriver.Leave", `{"NetworkID":"n","EndpointID":"e"}`)
	if text := fmt.Sprint(m["Err"]); status != 500 || !strings.Contains(text, db) || m["Err"] != m["Error"] {
		t.Errorf("Leave: %d %v", status, m)
	}
	if d := p.status(t); d.Phase != failed || !strings.Contains(d.Error, db) {
		t.Errorf("status: %+v", d)
	}
	if b, err := os.ReadFile(db); err != nil || !bytes.Equal(b, damaged) {
		t.Errorf("the damaged file was changed (%v)", err)
	}
	if err := os.Rename(db, db+".bad"); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		if status, m = p.call(t, "NetworkDriver.Leave", `{"NetworkID":"n","EndpointID":"e"}`); status == 200 {
			break
		}
		if i == 100 {
			t.Fatalf("still refused: %v", m)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if n := strings.Count(p.said(), "recovery failed"); n != 1 {
		t.Errorf("the failure was logged %d times", n)
	}
	p.stop(t)
}

// Whatever is wrong with the settings, the process answers, with all of it.
func TestServeUnusableSettings(t *testing.T) {
	bad := map[string]string{
		"LOG_LEVEL": "loud", "POOLS": "10.0.0.0/99", "SCOPE": "swarm", "PEERS": "host2:http", "UNDERLAY": "10.0.0.1/24", "GRACE": "ten", "FORWARD_GUARD": "maybe", "GOSSIP_PORT": "0",
		"STORE": "http://10.0.0.9",
	}
	var env []string
	for name, value := range bad {
		env = append(env, name+"="+value)
	}
	p := start(t, t.TempDir(), append(env, "SECRET=do not tell", "STORE_PASSWORD=nor this")...)
	if got := p.must(t, "Plugin.Activate", ""); fmt.Sprint(got["Implements"]) != "[NetworkDriver IpamDriver]" {
		t.Errorf("Activate: %v", got)
	}
	for _, method := range []string{"NetworkDriver.CreateNetwork", "IpamDriver.RequestPool"} {
		status, m := p.call(t, method, `{}`)
		text := fmt.Sprint(m["Err"])
		for name, value := range bad {
			if status != 500 || !strings.Contains(text, fmt.Sprintf("%s=%q: ", name, value)) || strings.ContainsAny(text, "\n") {
				t.Errorf("%s: %d %s\nwithout %s=%s", method, status, text, name, value)
			}
		}
		if strings.Contains(text, "do not tell") || strings.Contains(text, "nor this") || strings.Contains(text, "Parse") {
			t.Errorf("%s: %s", method, text)
		}
	}
	if d := p.status(t); d.Phase != failed || !strings.Contains(d.Error, "SCOPE=") {
		t.Errorf("status: %s, %s", d.Phase, d.Error)
	}
	if n := strings.Count(p.said(), "recovery failed"); n != 1 || !strings.Contains(p.said(), "GOSSIP_PORT=") {
		t.Errorf("it is logged %d times", n)
	}
	p.stop(t)
}

// How much is logged keeps nothing from working.
func TestServeBadLogLevel(t *testing.T) {
	p := start(t, t.TempDir(), "LOG_LEVEL=loud")
	p.must(t, "IpamDriver.RequestPool", `{"AddressSpace":"weft-local","Pool":"10.9.0.0/24"}`)
	p.stop(t)
	if said := p.said(); strings.Count(said, "level=error") != 1 || !strings.Contains(said, "LOG_LEVEL=") || !strings.Contains(said, "level=info") {
		t.Errorf("logged %s", said)
	}
}

func TestSettingsCheck(t *testing.T) {
	for name, c := range map[string]struct {
		settings settings
		want     string // "" for none
	}{
		"none":              {settings{}, ""},
		"interface":         {settings{underlay: "eth0.10"}, ""},
		"address":           {settings{underlay: "fd00::1"}, ""},
		"no such host":      {settings{underlay: "0.0.0.0"}, "UNDERLAY"},
		"long interface":    {settings{underlay: "an-interface-of-20ch"}, "UNDERLAY"},
		"instance":          {settings{instance: "Two Words"}, "INSTANCE"},
		"no store":          {settings{store: store.EtcdConfig{User: "me"}}, "STORE"},
		"peers and a store": {settings{peers: "host2", store: store.EtcdConfig{Endpoints: "etcd://host3"}}, "PEERS"},
		"no file":           {settings{store: store.EtcdConfig{Endpoints: "etcds://host3", CA: "/nowhere/ca.pem"}}, "/nowhere/ca.pem"},
		"no subnet":         {settings{pools: "10.300.0.0/16"}, `"10.300.0.0/16" is not a subnet`},
		"no size":           {settings{pools: "10.30.0.0/16"}, "has no size"},
		"short":             {settings{grace: "10ms"}, "GRACE"},
		"guard":             {settings{guard: "no"}, "FORWARD_GUARD"},
	} {
		c.settings.complete()
		err := c.settings.check()
		if (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// The second of two is refused and disturbs nothing.
func TestServeTwice(t *testing.T) {
	dir := t.TempDir()
	first := start(t, dir)
	second := exec.Command(os.Args[0], "serve", "--socket", dir+"/p.sock", "--state", dir)
	second.Env = append(os.Environ(), asMain+"=1")
	out, err := second.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another process answers") {
		t.Errorf("the second: %v, %s", err, out)
	}
	first.must(t, "NetworkDriver.Leave", `{"NetworkID":"n","EndpointID":"e"}`)
	first.stop(t)
}

// As it is shipped: the tests in this binary and the race detector take memory,
// and cgo keeps the process from changing the privileges of all its threads.
func TestShipped(t *testing.T) {
	dir := t.TempDir()
	build := exec.Command("go", "build", "-tags=nosystemd", "-trimpath", "-ldflags=-s -w", "-o", dir+"/weft", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd := exec.Command(dir+"/weft", "serve", "--socket", dir+"/p.sock", "--state", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	p := startCmd(t, dir, cmd)
	p.must(t, "NetworkDriver.Leave", `{"NetworkID":"n","EndpointID":"e"}`)
	t.Run("idle memory", func(t *testing.T) { checkIdleMemory(t, p) })
	p.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"n","Options":{},"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.9.0.0/24","Gateway":"10.9.0.1/24"}],"IPv6Data":[]}`)
	t.Run("privileges", func(t *testing.T) { checkPrivileges(t, p) })
	p.stop(t)
}

// The promise is 25 MB for an idle plugin.
func checkIdleMemory(t *testing.T, p *process) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		t.Fatalf("no VmRSS in %s", b)
	}
	kib, err := strconv.Atoi(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("resident: %d KiB", kib)
	if kib > 25*1000*1000/1024 {
		t.Errorf("resident: %d KiB, promised are 25 MB", kib)
	}
}

// Every thread has the privileges that it needs, and can have no others.
func checkPrivileges(t *testing.T, p *process) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.Process.Pid))
	if err != nil || len(threads) < 2 {
		t.Fatalf("threads %v, %v", threads, err)
	}
	keep := fmt.Sprintf("%016x", uint64(1<<1|1<<10|1<<12|1<<13)) // DAC_OVERRIDE, NET_BIND_SERVICE, NET_ADMIN, NET_RAW
	for _, f := range threads {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		for field, want := range map[string]string{"CapBnd": keep, "CapPrm": keep, "CapEff": keep, "CapInh": "0000000000000000", "NoNewPrivs": "1"} {
			_, rest, _ := strings.Cut(string(b), field+":")
			if got, _, _ := strings.Cut(strings.TrimSpace(rest), "\n"); got != want {
				t.Errorf("%s: %s %s, want %s", f, field, got, want)
			}
		}
	}
}

// serveIn starts a process with a state of its own in the network namespace of the
// calling thread.
func serveIn(t *testing.T, args ...string) *process {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], append([]string{"serve", "--socket", dir + "/p.sock", "--state", dir}, args...)...)
	cmd.Env = append(os.Environ(), asMain+"=1")
	return startCmd(t, dir, cmd)
}

const leaveNothing = `{"NetworkID":"n","EndpointID":"e"}`

// Two instances work side by side in one network namespace; a second process of
// one of them says why it does not, until the first one ends.
func TestServeInstances(t *testing.T) {
	netnstest.Enter(t)
	local, global := serveIn(t), serveIn(t, "-scope", "global")
	local.must(t, "NetworkDriver.Leave", leaveNothing)
	global.must(t, "NetworkDriver.Leave", leaveNothing)
	if a, b := local.status(t).Instance, global.status(t).Instance; a != "local" || b != "global" {
		t.Errorf("instances %q and %q", a, b)
	}
	twin := serveIn(t)
	status, m := twin.call(t, "NetworkDriver.Leave", leaveNothing)
	if text := fmt.Sprint(m["Err"]); status != 500 || !strings.Contains(text, "instance local runs already") || !strings.Contains(text, local.dir) || !strings.Contains(text, "INSTANCE=") {
		t.Errorf("a second process of an instance: %d %v", status, m)
	}
	if d := twin.status(t); d.Phase != failed || !strings.Contains(d.Error, "INSTANCE=") {
		t.Errorf("its status: %s %s", d.Phase, d.Error)
	}
	named := serveIn(t, "-instance", "lab")
	named.must(t, "NetworkDriver.Leave", leaveNothing)
	_ = local.Process.Kill()
	<-local.ended
	for end := time.Now().Add(20 * time.Second); twin.status(t).Phase != serving; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not take over when the first one is gone")
		}
	}
	for _, p := range []*process{global, twin, named} {
		p.stop(t)
	}
}

// A state whose instance has links is no other instance's.
func TestServeStateOfAnotherInstance(t *testing.T) {
	ns := netnstest.Enter(t)
	dir := t.TempDir()
	begin := func(instance string) *process {
		cmd := exec.Command(os.Args[0], "serve", "--socket", dir+"/p.sock", "--state", dir, "--instance", instance)
		cmd.Env = append(os.Environ(), asMain+"=1")
		return startCmd(t, dir, cmd)
	}
	p := begin("one")
	p.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"n1","Options":{},"IPv4Data":[{"Pool":"10.7.0.0/24","Gateway":"10.7.0.1/24"}]}`)
	p.stop(t)
	p = begin("two")
	status, m := p.call(t, "NetworkDriver.Leave", leaveNothing)
	if text := fmt.Sprint(m["Err"]); status != 500 || !strings.Contains(text, "of instance one") || !strings.Contains(text, "weft uninstall -instance one") {
		t.Errorf("the state of another: %d %v", status, m)
	}
	p.stop(t)
	ns.Exec("sh", "-ec", "for l in $(ip -o link show type bridge | cut -d: -f2); do ip link del $l; done")
	p = begin("two") // as after a reboot
	p.must(t, "NetworkDriver.Leave", leaveNothing)
	p.stop(t)
}

func TestInstanceDefaults(t *testing.T) {
	for _, c := range []struct{ scope, instance, want, state, socket string }{
		{"local", "", "local", "/var/lib/weft", "/run/docker/plugins/weft.sock"},
		{"global", "", "global", "/var/lib/weft-global", "/run/docker/plugins/weft-global.sock"},
		{"global", "local", "local", "/var/lib/weft", "/run/docker/plugins/weft.sock"},
		{"local", "lab", "lab", "/var/lib/weft-lab", "/run/docker/plugins/weft-lab.sock"},
	} {
		s := settings{scope: c.scope, instance: c.instance}
		if s.complete(); s.check() != nil || s.instance != c.want || s.state != c.state || s.socket != c.socket {
			t.Errorf("%+v: %v, %s, %s, %s", c, s.check(), s.instance, s.state, s.socket)
		}
	}
}
