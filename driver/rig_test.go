package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
	"github.com/weftnet/weft/internal/store"
)

// rig is a driver behind the real wire, over real stores and a kernel that is
// a map. After every test, reconcile must have nothing to do; nor after one
// more restart.
type rig struct {
	t      *testing.T
	d      *Driver
	kernel *fakeKernel
	host   *fakeHost
	faults *faults
	clock  *clock
	log    *logtest.Hook
	logger *logrus.Logger

	change    func(*Config)
	nets, eps *store.Bolt
	client    *http.Client
	stop      func()
	lives     int
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigWith(t, func(*Config) {})
}

// newRigWith lets the caller change what the driver is given at each start.
func newRigWith(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	f := &faults{}
	r := &rig{t: t, faults: f, change: change, kernel: newFakeKernel(f), clock: &clock{at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}}
	r.host = newFakeHost(r.kernel, 1450)
	r.host.card(datapath.LinkFacts{Name: "eth0", Up: true, MTU: 1500, MAC: datapath.MAC{2, 0, 0, 0, 0, 1},
		Addrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.10/24"), netip.MustParsePrefix("fd00:1::10/64")}})
	r.logger, r.log = logtest.NewNullLogger()
	dir := t.TempDir()
	r.nets = openStore(t, filepath.Join(dir, "weft.db"))
	r.eps = openStore(t, filepath.Join(dir, "run.db"))
	r.start()
	t.Cleanup(func() {
		r.faults.arm(0, false)
		r.idle()
		r.restart()
		r.idle()
		r.stop()
	})
	return r
}

func openStore(t *testing.T, path string) *store.Bolt {
	t.Helper()
	b, err := store.Open(path, store.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (r *rig) start() {
	r.t.Helper()
	conf := Config{
		Networks: faultyStore{r.nets, r.faults}, Endpoints: faultyStore{r.eps, r.faults}, Kernel: r.kernel,
		Backends: allBackends(),
		Host:     r.host,
		Log:      r.logger,
	}
	r.change(&conf)
	d, err := New(conf)
	if err != nil {
		r.t.Fatal(err)
	}
	d.now, d.started = r.clock.now, r.clock.now()
	r.d = d

	m := plugin.New(plugin.Config{Log: quiet(), Timeout: 5 * time.Second})
	m.Constant(plugin.PathNetworkCapabilities, Capabilities(false))
	d.Register(m)
	r.lives++
	path := filepath.Join(r.t.TempDir(), fmt.Sprintf("w%d.sock", r.lives))
	l, err := plugin.Listen(path)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, l) }()
	r.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	r.stop = func() {
		r.client.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			r.t.Error(err)
		}
	}
	err = d.Recover(ctx)
	m.Ready(err)
	if err != nil {
		r.t.Error("recover:", err)
	}
}

func allBackends() map[string]Backend {
	return map[string]Backend{modeBridge: Bridge{}, modeMacvlan: Parent{modeMacvlan}, modeIPvlan: Parent{modeIPvlan}}
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// restart is the process killed and started again.
func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	r.kernel.die()
	r.start()
}

// call posts a body and returns the answer, or the error the engine shows.
func (r *rig) call(method, body string) (string, error) {
	resp, err := r.client.Post("http://plugin/NetworkDriver."+method, "", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		var e struct{ Err string }
		if err := json.Unmarshal(b, &e); err != nil || e.Err == "" {
			return "", fmt.Errorf("undecodable answer %d %s", resp.StatusCode, b)
		}
		return "", errors.New(e.Err)
	}
	return string(bytes.TrimSpace(b)), nil
}

// must is call for what has to succeed.
func (r *rig) must(method, body string) string {
	r.t.Helper()
	answer, err := r.call(method, body)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, body, err)
	}
	return answer
}

// refused is call for what has to fail, with each of the words in one line.
func (r *rig) refused(method, body string, words ...string) {
	r.t.Helper()
	answer, err := r.call(method, body)
	if err == nil {
		r.t.Fatalf("%s %s: succeeded with %s", method, body, answer)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			r.t.Errorf("%s: error %q does not say %q", method, err, w)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		r.t.Errorf("%s: error is more than one line: %q", method, err)
	}
}

func (r *rig) reconcile() []string {
	r.t.Helper()
	lines, err := r.d.Reconcile(r.t.Context())
	if err != nil {
		r.t.Error("reconcile:", err)
	}
	return lines
}

// idle is the invariant: what was done by requests needs no repair.
func (r *rig) idle() {
	r.t.Helper()
	before := r.kernel.text()
	lines, err := r.d.Reconcile(context.Background())
	if err != nil {
		r.t.Error("reconcile:", err)
	}
	if len(lines) > 0 {
		r.t.Errorf("reconcile changed:\n%s\nin\n%s", strings.Join(lines, "\n"), before)
	}
	if after := r.kernel.text(); after != before {
		r.t.Errorf("reconcile changed the kernel from\n%s\nto\n%s", before, after)
	}
	r.synced()
}

// synced checks that the stores hold what is in memory, and nothing else.
func (r *rig) synced() {
	r.t.Helper()
	want := map[string]string{}
	text := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			r.t.Fatal(err)
		}
		return string(b)
	}
	r.d.mu.Lock()
	for _, n := range r.d.networks {
		want[networkKey(n.rec.ID)] = text(n.rec)
		for _, e := range n.endpoints {
			want[endpointKey(n.rec.ID, e.rec.ID)] = text(e.rec)
		}
	}
	r.d.mu.Unlock()
	got := map[string]string{}
	for _, s := range []*store.Bolt{r.nets, r.eps} {
		list, err := s.List(context.Background(), "")
		if err != nil {
			r.t.Fatal(err)
		}
		for _, rec := range list {
			got[rec.Key] = string(rec.Value)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		r.t.Errorf("memory and stores differ:\n%s", diff)
	}
}

// empty checks that nothing is left anywhere.
func (r *rig) empty() {
	r.t.Helper()
	if t := strings.ReplaceAll(strings.ReplaceAll(r.kernel.text(), "sysctl net.ipv4.ip_forward=1\n", ""), "sysctl net.ipv6.conf.all.forwarding=1\n", ""); t != "" {
		r.t.Errorf("left in the kernel:\n%s", t)
	}
	if list := r.records(); len(list) > 0 {
		r.t.Errorf("left in the stores: %s", strings.Join(list, ", "))
	}
	s, err := r.d.Status(r.t.Context())
	if err != nil || len(s.Networks)+len(s.Endpoints) > 0 {
		r.t.Errorf("left in memory: %+v, %v", s, err)
	}
}

// records are the keys in both stores.
func (r *rig) records() (keys []string) {
	r.t.Helper()
	for _, s := range []*store.Bolt{r.nets, r.eps} {
		list, err := s.List(context.Background(), "")
		if err != nil {
			r.t.Fatal(err)
		}
		for _, rec := range list {
			keys = append(keys, rec.Key)
		}
	}
	return keys
}

// warned counts the log's warnings that contain text.
func (r *rig) warned(text string) (count int) {
	for _, e := range r.log.AllEntries() {
		if e.Level.String() == "warning" && strings.Contains(e.Message, text) {
			count++
		}
	}
	return count
}

// IDs as the engine makes them.
const (
	net1 = "1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f809"
	net2 = "2a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f809"
	net3 = "3a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f809"
	swm1 = "n3rbq4trs8vhx1y0kgm2dpc5w" // of a swarm
	ep1  = "e11111111111708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f809"
	ep2  = "e22222222222708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f809"
	ep3  = "e33333333333708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f809"

	veth1  = "wfve11111111111"
	child1 = "wfce11111111111"
)

// createNetwork is the body of 28.5 for a network with options in JSON.
func createNetwork(id, pool, options string) string {
	p := strings.TrimSuffix(pool, "0/24")
	if options == "" {
		options = "{}"
	}
	return fmt.Sprintf(`{"NetworkID":%q,"Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,`+
		`"com.docker.network.generic":%s},"IPv4Data":[{"AddressSpace":"local","Pool":%q,"Gateway":"%s1/24"}],"IPv6Data":[]}`, id, options, pool, p)
}

// createDual is createNetwork of net1 with IPv6.
func createDual(options string) string {
	if options == "" {
		options = "{}"
	}
	return fmt.Sprintf(`{"NetworkID":%q,"Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":true,`+
		`"com.docker.network.generic":%s},"IPv4Data":[{"AddressSpace":"local","Pool":"10.1.0.0/24","Gateway":"10.1.0.1/24","AuxAddresses":{}}],`+
		`"IPv6Data":[{"AddressSpace":"local","Pool":"fd00:1::/64","Gateway":"fd00:1::1/64","AuxAddresses":{}}]}`, net1, options)
}

func createEndpoint(network, endpoint, addr, addr6 string) string {
	return fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q,"AddressIPv6":%q,"MacAddress":""},"Options":{"com.docker.network.endpoint.exposedports":[],"com.docker.network.portmap":[]}}`,
		network, endpoint, addr, addr6)
}

func ids(network, endpoint string) string {
	return fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, network, endpoint)
}

func joinBody(network, endpoint string) string {
	return fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/var/run/docker/netns/0123456789ab","Options":{"com.docker.network.endpoint.exposedports":[],"com.docker.network.portmap":[]}}`, network, endpoint)
}

// program is a call with port bindings in the short form of ports.
func program(network, endpoint string, bindings ...string) string {
	return fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Options":{"com.docker.network.endpoint.exposedports":[],"com.docker.network.portmap":[%s]}}`,
		network, endpoint, strings.Join(bindings, ","))
}

func binding(proto int, port uint16, hostIP string, first, last uint16) string {
	return fmt.Sprintf(`{"Proto":%d,"IP":"","Port":%d,"HostIP":%q,"HostPort":%d,"HostPortEnd":%d}`, proto, port, hostIP, first, last)
}
