package plugin_test

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
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/plugin"
)

// server is a Mux on a real socket.
type server struct {
	*plugin.Mux
	socket string
	client *http.Client
	log    *record
	stop   func()     // ends the context of Serve
	done   chan error // what Serve returned
}

// record keeps log lines.
type record struct {
	mu    sync.Mutex
	lines bytes.Buffer
}

func (r *record) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lines.Write(b)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lines.String()
}

// wait returns the log once it contains want; the line of a call is written
// after its answer.
func (r *record) wait(t *testing.T, want string) string {
	t.Helper()
	for range 500 {
		if s := r.String(); strings.Contains(s, want) {
			return s
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no %q in the log:\n%s", want, r)
	return ""
}

func serve(t *testing.T, timeout time.Duration) *server {
	t.Helper()
	s := &server{socket: filepath.Join(t.TempDir(), "d", "p.sock"), log: &record{}, done: make(chan error, 1)}
	log := logrus.New()
	level, err := logrus.ParseLevel("debug")
	if err != nil {
		t.Fatal(err)
	}
	log.SetLevel(level)
	log.SetFormatter(&logrus.JSONFormatter{})
	log.SetOutput(s.log)
	s.Mux = plugin.New(plugin.Config{Log: log, Timeout: timeout})
	l, err := plugin.Listen(s.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	go func() { s.done <- s.Serve(ctx, l) }()
	s.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", s.socket)
		},
		MaxIdleConnsPerHost: 64,
	}}
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-s.done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve did not return")
		}
		s.client.CloseIdleConnections()
	})
	return s
}

// ended waits for Serve and puts its result back for the cleanup.
func (s *server) ended(t *testing.T) {
	t.Helper()
	err := <-s.done
	s.done <- err
	if err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func (s *server) do(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://weft"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
		return 0, ""
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode, string(b)
}

func (s *server) post(t *testing.T, path, body string) (int, string) {
	t.Helper()
	return s.do(t, http.MethodPost, path, body)
}

// wantError checks that both halves of the protocol would see an error.
func wantError(t *testing.T, wantStatus, status int, body, part string) {
	t.Helper()
	var e struct{ Err, Error string }
	if err := json.Unmarshal([]byte(body), &e); err != nil {
		t.Errorf("answer %q: %v", body, err)
	}
	if status != wantStatus || e.Err != e.Error || !strings.Contains(e.Err, part) || e.Err == "" {
		t.Errorf("got %d %s, want %d with %q in Err and Error", status, body, wantStatus, part)
	}
}

func nop(context.Context, network.LeaveRequest) (plugin.Empty, error) { return plugin.Empty{}, nil }

const leave = `{"NetworkID":"n1","EndpointID":"e1"}`

// Bodies as engines send them, and what has to arrive at the handler.
func TestRecordedRequests(t *testing.T) {
	s := serve(t, 0)
	recorded(t, s, plugin.PathCreateNetwork,
		`{"NetworkID":"f3","Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{"k":"v"}},`+
			`"IPv4Data":[{"AddressSpace":"L","Pool":"10.5.0.0/24","Gateway":"10.5.0.1/24","AuxAddresses":{"a1":"10.5.0.5/24"}}],"IPv6Data":[]}`+"\n",
		network.CreateNetworkRequest{
			NetworkID: "f3",
			Options: map[string]any{
				plugin.OptionEnableIPv4: true, plugin.OptionEnableIPv6: false,
				plugin.OptionGeneric: map[string]any{"k": "v"},
			},
			IPv4Data: []*network.IPAMData{{
				AddressSpace: "L", Pool: "10.5.0.0/24", Gateway: "10.5.0.1/24", AuxAddresses: map[string]any{"a1": "10.5.0.5/24"},
			}},
			IPv6Data: []*network.IPAMData{},
		}, plugin.Empty{}, `{}`)
	recorded(t, s, plugin.PathCreateEndpoint,
		`{"NetworkID":"f3","EndpointID":"e1","Interface":{"Address":"10.6.0.2/24","AddressIPv6":"","MacAddress":""},"Options":{"com.docker.network.endpoint.macaddress":"AhEiM0RV"}}`,
		plugin.CreateEndpointRequest{
			NetworkID: "f3", EndpointID: "e1", Interface: &network.EndpointInterface{Address: "10.6.0.2/24"},
			Options: plugin.ContainerOptions{plugin.OptionMACAddress: "AhEiM0RV"},
		},
		network.CreateEndpointResponse{Interface: &network.EndpointInterface{MacAddress: "02:00:00:00:00:01"}},
		`{"Interface":{"Address":"","AddressIPv6":"","MacAddress":"02:00:00:00:00:01"}}`)
	recorded(t, s, plugin.PathJoin,
		`{"NetworkID":"f3","EndpointID":"e1","SandboxKey":"/var/run/docker/netns/ab12","Options":{}}`,
		plugin.JoinRequest{NetworkID: "f3", EndpointID: "e1", SandboxKey: "/var/run/docker/netns/ab12", Options: plugin.ContainerOptions{}},
		&plugin.JoinResponse{
			JoinResponse:  network.JoinResponse{Gateway: "10.6.0.1"},
			InterfaceName: &plugin.InterfaceName{InterfaceName: network.InterfaceName{SrcName: "wfp1", DstPrefix: "eth"}},
		},
		`{"Gateway":"10.6.0.1","GatewayIPv6":"","StaticRoutes":null,"DisableGatewayService":false,"InterfaceName":{"SrcName":"wfp1","DstPrefix":"eth"}}`)
	recorded(t, s, plugin.PathEndpointOperInfo, leave, network.InfoRequest{NetworkID: "n1", EndpointID: "e1"},
		plugin.EndpointInfoResponse{Value: map[string]any{"mtu": 1500}}, `{"Value":{"mtu":1500}}`)
	recorded(t, s, plugin.PathGwAllocCheck, `{"Options":{"com.docker.network.internal":true}}`,
		plugin.GwAllocCheckRequest{Options: map[string]any{plugin.OptionInternal: true}},
		plugin.GwAllocCheckResponse{SkipIPv6: true}, `{"SkipIPv4":false,"SkipIPv6":true}`)
	recorded(t, s, plugin.PathDiscoverNew, `{"DiscoveryType":1,"DiscoveryData":{"Address":"10.0.0.1","BindAddress":"10.0.0.1","Self":true}}`,
		plugin.DiscoveryNotification{
			DiscoveryType: plugin.DiscoverNode, DiscoveryData: plugin.NodeDiscovery{Address: "10.0.0.1", BindAddress: "10.0.0.1", Self: true},
		}, plugin.Empty{}, `{}`)
	recorded(t, s, plugin.PathRequestPool, `{"AddressSpace":"l","Pool":"","SubPool":"","Options":null,"V6":true}`,
		ipam.RequestPoolRequest{AddressSpace: "l", V6: true},
		ipam.RequestPoolResponse{PoolID: "p", Pool: "fd00::/64"}, `{"PoolID":"p","Pool":"fd00::/64","Data":null}`)
	recorded(t, s, plugin.PathRequestAddress, `{"PoolID":"p","Address":"","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		ipam.RequestAddressRequest{PoolID: "p", Options: map[string]string{plugin.OptionRequestAddressType: plugin.RequestAddressGateway}},
		(*ipam.RequestAddressResponse)(nil), `{}`)
}

func recorded[Req, Resp any](t *testing.T, s *server, path, body string, want Req, resp Resp, wantAnswer string) {
	t.Helper()
	var got Req
	plugin.Handle(s.Mux, path, func(_ context.Context, r Req) (Resp, error) { got = r; return resp, nil })
	s.Ready(nil)
	status, answer := s.post(t, path, body)
	if status != 200 || answer != wantAnswer {
		t.Errorf("%s: got %d %s, want 200 %s", path, status, answer, wantAnswer)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: request (-want +got):\n%s", path, diff)
	}
}

func TestConstants(t *testing.T) {
	s := serve(t, 0)
	s.Constant(plugin.PathNetworkCapabilities, plugin.NetworkCapabilities{
		CapabilitiesResponse: network.CapabilitiesResponse{Scope: network.LocalScope, ConnectivityScope: network.LocalScope}, GwAllocChecker: true,
	})
	s.Constant(plugin.PathIpamCapabilities, plugin.IpamCapabilities{})
	want := map[string]string{
		plugin.PathActivate:            `{"Implements":["NetworkDriver","IpamDriver"]}`,
		plugin.PathNetworkCapabilities: `{"Scope":"local","ConnectivityScope":"local","GwAllocChecker":true}`,
		plugin.PathIpamCapabilities:    `{"RequiresMACAddress":false,"RequiresRequestReplay":false}`,
	}
	check := func() {
		t.Helper()
		for path, answer := range want {
			for _, body := range []string{"", "{}", "nonsense"} {
				if status, got := s.post(t, path, body); status != 200 || got != answer {
					t.Errorf("%s with body %q: got %d %s, want %s", path, body, status, got, answer)
				}
			}
		}
	}
	check() // while recovery runs
	var asked atomic.Int32
	s.Notice(plugin.PathIpamCapabilities, func() { asked.Add(1) })
	s.Ready(errors.New("database damaged"))
	check()
	if n := asked.Load(); n != 3 {
		t.Errorf("asked for IPAM's capabilities 3 times, noticed %d times", n)
	}
}

func TestRefusals(t *testing.T) {
	s := serve(t, 0)
	var calls atomic.Int32
	plugin.Handle(s.Mux, plugin.PathLeave, func(context.Context, network.LeaveRequest) (plugin.Empty, error) {
		calls.Add(1)
		return plugin.Empty{}, nil
	})
	s.Ready(nil)
	const path = plugin.PathLeave
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		part                     string
	}{
		{"empty", "POST", path, "", 400, "empty"},
		{"blank", "POST", path, " \n\t", 400, "empty"},
		{"null", "POST", path, "null", 400, "not a JSON object"},
		{"array", "POST", path, "[]", 400, "not a JSON object"},
		{"cut off", "POST", path, leave[:20], 400, "undecodable"},
		{"two objects", "POST", path, leave + leave, 400, "undecodable"},
		{"wrong type", "POST", path, `{"NetworkID":1}`, 400, "undecodable"},
		{"too large", "POST", path, `{"NetworkID":"` + strings.Repeat("x", 1<<20) + `"}`, 413, "1048576"},
		{"unknown call", "POST", "/NetworkDriver.Nothing", leave, 404, "/NetworkDriver.Nothing"[1:]},
		{"not a POST", "GET", path, "", 405, "POST"},
		{"put on a constant", "PUT", plugin.PathActivate, "{}", 405, "POST"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, body := s.do(t, c.method, c.path, c.body)
			wantError(t, c.status, status, body, c.part)
		})
	}
	if n := calls.Load(); n != 0 {
		t.Errorf("the handler ran %d times", n)
	}
	if status, body := s.post(t, path, leave); status != 200 || body != "{}" {
		t.Errorf("afterwards: %d %s", status, body)
	}
}

func TestLargestBody(t *testing.T) {
	s := serve(t, 0)
	plugin.Handle(s.Mux, plugin.PathLeave, nop)
	s.Ready(nil)
	body := leave + strings.Repeat(" ", 1<<20-len(leave))
	if status, answer := s.post(t, plugin.PathLeave, body); status != 200 {
		t.Errorf("1 MiB: %d %s", status, answer)
	}
	status, answer := s.post(t, plugin.PathLeave, body+" ")
	wantError(t, 413, status, answer, "larger")
}

// Ten thousand published ports, as the engine sends them: two megabytes.
func TestBodyOfManyPorts(t *testing.T) {
	s := serve(t, 0)
	var got []plugin.PortBinding
	for _, path := range []string{plugin.PathCreateEndpoint, plugin.PathJoin, plugin.PathProgramExternal} {
		plugin.Handle(s.Mux, path, func(_ context.Context, r plugin.ProgramExternalRequest) (_ plugin.Empty, err error) {
			if r.Options["other"] != true || len(r.Options) != 2 {
				t.Errorf("%d options, other is %v", len(r.Options), r.Options["other"])
			}
			got, err = plugin.ParsePortMap(r.Options)
			return plugin.Empty{}, err
		})
	}
	plugin.Handle(s.Mux, plugin.PathLeave, nop)
	s.Ready(nil)
	var ports, exposed []string
	for p := 10000; p <= 20000; p++ {
		ports = append(ports, fmt.Sprintf(`{"Proto":17,"IP":"","Port":%d,"HostIP":"","HostPort":%d,"HostPortEnd":%d}`, p, p, p))
		exposed = append(exposed, fmt.Sprintf(`{"Proto":17,"Port":%d}`, p))
	}
	body := `{"NetworkID":"n1","EndpointID":"e1","Options":{"com.docker.network.endpoint.exposedports":[` + strings.Join(exposed, ",") +
		`],"other":true,"com.docker.network.portmap":[` + strings.Join(ports, ",") + `]}}`
	want := []plugin.PortBinding{{Proto: 17, Port: 10000, More: 10000, HostPort: 10000, HostPortEnd: 10000}}
	for _, path := range []string{plugin.PathCreateEndpoint, plugin.PathJoin, plugin.PathProgramExternal} {
		got = nil
		if status, answer := s.post(t, path, body); status != 200 {
			t.Errorf("%s: %d %s", path, status, answer)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s: bindings (-want +got):\n%s", path, diff)
		}
	}
	status, answer := s.post(t, plugin.PathLeave, body)
	wantError(t, 413, status, answer, "larger")
	status, answer = s.post(t, plugin.PathJoin, body+strings.Repeat(" ", 16<<20))
	wantError(t, 413, status, answer, "more than 100,000 ports: publish fewer")
}

func TestHandlerErrors(t *testing.T) {
	s := serve(t, 0)
	plugin.Handle(s.Mux, "/A.Error", func(context.Context, plugin.Empty) (plugin.Empty, error) {
		return plugin.Empty{}, errors.New(`no "quotes"` + "\nsecond line")
	})
	plugin.Handle(s.Mux, "/A.Panic", func(context.Context, plugin.Empty) (plugin.Empty, error) {
		panic("boom")
	})
	plugin.Handle(s.Mux, "/A.NotObject", func(context.Context, plugin.Empty) ([]int, error) { return []int{1}, nil })
	plugin.Handle(s.Mux, "/A.NotJSON", func(context.Context, plugin.Empty) (map[string]any, error) {
		return map[string]any{"f": func() {}}, nil
	})
	plugin.Handle(s.Mux, "/A.Leave", nop)
	s.Ready(nil)
	for path, part := range map[string]string{
		"/A.Error": `no "quotes"`, "/A.Panic": "internal error: boom", "/A.NotObject": "not an object", "/A.NotJSON": "encode answer",
	} {
		status, body := s.post(t, path, "{}")
		wantError(t, 500, status, body, part)
	}
	if log := s.log.wait(t, "panic: "); !strings.Contains(log, "mux_test.go") {
		t.Errorf("no stack in the log:\n%s", log)
	}
	if status, _ := s.post(t, "/A.Leave", leave); status != 200 {
		t.Errorf("a call after the panic: %d", status)
	}
}

func TestHangingHandler(t *testing.T) {
	s := serve(t, 300*time.Millisecond)
	release, cancelled := make(chan struct{}), make(chan error, 1)
	plugin.Handle(s.Mux, plugin.PathJoin, func(ctx context.Context, _ network.JoinRequest) (plugin.Empty, error) {
		<-ctx.Done()
		cancelled <- ctx.Err()
		<-release // as a disk that does not come back
		return plugin.Empty{}, nil
	})
	plugin.Handle(s.Mux, plugin.PathLeave, nop)
	s.Ready(nil)
	start := time.Now()
	status, body := s.post(t, plugin.PathJoin, leave)
	wantError(t, 500, status, body, "no result within 300ms")
	if took := time.Since(start); took < 300*time.Millisecond || took > 2*time.Second {
		t.Errorf("answered after %v", took)
	}
	if err := <-cancelled; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the handler's context: %v", err)
	}
	if status, _ := s.post(t, plugin.PathLeave, leave); status != 200 {
		t.Errorf("a call beside the hanging one: %d", status)
	}
	close(release)
	s.log.wait(t, "ended after it was answered")
}

func TestCallerGoesAway(t *testing.T) {
	s := serve(t, 0)
	started, gone, result := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	plugin.Handle(s.Mux, plugin.PathJoin, func(ctx context.Context, _ network.JoinRequest) (plugin.Empty, error) {
		close(started)
		<-gone
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
		result <- ctx.Err()
		return plugin.Empty{}, nil
	})
	s.Ready(nil)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-started
		cancel()
		close(gone)
	}()
	req, err := http.NewRequestWithContext(ctx, "POST", "http://weft"+plugin.PathJoin, strings.NewReader(leave))
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := s.client.Do(req); err == nil {
		_ = resp.Body.Close()
		t.Error("the request was not cut off")
	}
	if err := <-result; err != nil {
		t.Errorf("the handler was cancelled with its client: %v", err)
	}
}

func TestConcurrentCalls(t *testing.T) {
	s := serve(t, 0)
	var inside, most atomic.Int32
	all := make(chan struct{})
	plugin.Handle(s.Mux, plugin.PathLeave, func(ctx context.Context, r network.LeaveRequest) (map[string]string, error) {
		n := inside.Add(1)
		defer inside.Add(-1)
		if n == 32 {
			most.Store(n)
			close(all)
		}
		select {
		case <-all:
		case <-ctx.Done():
		}
		return map[string]string{"EndpointID": r.EndpointID}, nil
	})
	s.Ready(nil)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			want := fmt.Sprintf(`{"EndpointID":"e%d"}`, i)
			if status, body := s.post(t, plugin.PathLeave, fmt.Sprintf(`{"NetworkID":"n","EndpointID":"e%d"}`, i)); status != 200 || body != want {
				t.Errorf("got %d %s, want %s", status, body, want)
			}
		})
	}
	wg.Wait()
	if most.Load() != 32 {
		t.Error("32 calls never ran at once")
	}
}

func TestLogLines(t *testing.T) {
	s := serve(t, 0)
	plugin.Handle(s.Mux, plugin.PathLeave, nop)
	plugin.Handle(s.Mux, plugin.PathReleasePool, func(context.Context, ipam.ReleasePoolRequest) (plugin.Empty, error) {
		return plugin.Empty{}, errors.New("no such thing")
	})
	s.Ready(nil)
	s.post(t, plugin.PathLeave, leave)
	s.post(t, plugin.PathReleasePool, `{"PoolID":"`+strings.Repeat("p", 100)+`"}`)
	s.log.wait(t, "no such thing")
	var got []map[string]any
	for line := range strings.Lines(s.log.String()) {
		m := map[string]any{}
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(err)
		}
		if _, ok := m["duration"]; !ok {
			t.Errorf("no duration: %s", line)
		}
		delete(m, "duration")
		delete(m, "time")
		got = append(got, m)
	}
	want := []map[string]any{
		{"level": "debug", "msg": "call done", "call": "NetworkDriver.Leave", "network": "n1", "endpoint": "e1"},
		{"level": "warning", "msg": "call failed", "call": "IpamDriver.ReleasePool", "pool": strings.Repeat("p", 64), "error": "no such thing"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func TestTwoHandlersForOnePath(t *testing.T) {
	m := plugin.New(plugin.Config{Log: logrus.New()})
	defer func() {
		if recover() == nil {
			t.Error("the second registration of a path was accepted")
		}
	}()
	plugin.Handle(m, plugin.PathActivate, nop)
}
