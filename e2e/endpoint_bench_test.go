//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// plainServe is a `weft serve` in a network namespace of its own, without an
// engine, driven through its socket.
type plainServe struct {
	bin, dir string
	cmd      *exec.Cmd
	client   *http.Client
	conn     net.Conn
	answers  *bufio.Reader
}

func newPlainServe(b *testing.B) *plainServe {
	b.Helper()
	dir := b.TempDir()
	bin := filepath.Join(dir, "weft")
	build := exec.Command("go", "build", "-tags=nosystemd", "-o", bin, "../cmd/weft")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	s := &plainServe{bin: bin, dir: dir}
	s.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(dir, "weft.sock"))
		},
		MaxIdleConnsPerHost: 16,
	}}
	return s
}

// start runs the process; in decides its network namespace ("" is a new one,
// else a process whose namespace is joined).
func (s *plainServe) start(b *testing.B, in string) {
	b.Helper()
	args := []string{s.bin, "serve", "--state", filepath.Join(s.dir, "state"), "--socket", filepath.Join(s.dir, "weft.sock"), "--log-level", "error"}
	if in != "" {
		args = append([]string{"nsenter", "--net=" + in}, args...)
	}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Stderr = os.Stderr
	if in == "" {
		s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	if err := s.cmd.Start(); err != nil {
		b.Fatal(err)
	}
}

func (s *plainServe) kill() {
	if s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// call posts on one connection, without an HTTP client: its goroutines would
// be timed as well.
func (s *plainServe) call(b *testing.B, method string, body any) {
	b.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		b.Fatal(err)
	}
	if s.conn == nil {
		if s.conn, err = net.Dial("unix", filepath.Join(s.dir, "weft.sock")); err != nil {
			b.Fatal(err)
		}
		s.answers = bufio.NewReader(s.conn)
	}
	if _, err := fmt.Fprintf(s.conn, "POST /%s HTTP/1.1\r\nHost: weft\r\nContent-Length: %d\r\n\r\n%s", method, len(data), data); err != nil {
		b.Fatal(err)
	}
	res, err := http.ReadResponse(s.answers, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if text, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
		b.Fatalf("%s: %s", method, text)
	}
}

// firstAnswer is the time until a call that needs the recovered state is
// answered.
func (s *plainServe) firstAnswer(b *testing.B) time.Duration {
	b.Helper()
	begin := time.Now()
	for time.Since(begin) < 20*time.Second {
		res, err := s.client.Post("http://weft/NetworkDriver.EndpointOperInfo", "",
			strings.NewReader(fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, benchNetwork, benchEndpoint(0))))
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return time.Since(begin)
			}
		}
		time.Sleep(time.Millisecond)
	}
	b.Fatal("no answer within 20 s")
	return 0
}

// waitListening waits until the socket takes connections, which may be before
// recovery has ended.
func (s *plainServe) waitListening(b *testing.B) {
	b.Helper()
	for range 2000 {
		if c, err := net.Dial("unix", filepath.Join(s.dir, "weft.sock")); err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	b.Fatal("weft serve does not listen")
}

var benchNetwork = strings.Repeat("b", 64)

func benchEndpoint(i int) string { return fmt.Sprintf("%012x%052x", i+1, 0) }

func (s *plainServe) createNetwork(b *testing.B) {
	b.Helper()
	s.call(b, "NetworkDriver.CreateNetwork", map[string]any{
		"NetworkID": benchNetwork,
		"Options":   map[string]any{"com.docker.network.enable_ipv6": false, "com.docker.network.generic": map[string]any{}},
		"IPv4Data":  []any{map[string]any{"AddressSpace": "weft-local", "Pool": "10.9.0.0/16", "Gateway": "10.9.0.1/16"}},
		"IPv6Data":  []any{},
	})
}

func (s *plainServe) createAndJoin(b *testing.B, i int) {
	b.Helper()
	id := benchEndpoint(i)
	s.call(b, "NetworkDriver.CreateEndpoint", map[string]any{
		"NetworkID": benchNetwork, "EndpointID": id, "Options": map[string]any{},
		"Interface": map[string]any{"Address": fmt.Sprintf("10.9.%d.%d/16", (i+2)/256, (i+2)%256), "AddressIPv6": "", "MacAddress": ""},
	})
	s.call(b, "NetworkDriver.Join", map[string]any{
		"NetworkID": benchNetwork, "EndpointID": id, "Options": map[string]any{}, "SandboxKey": "/var/run/docker/netns/000000000000",
	})
}

// idleCalls is how long two calls take that only look something up.
func (s *plainServe) idleCalls(b *testing.B, n int) time.Duration {
	b.Helper()
	var all []time.Duration
	for range n {
		begin := time.Now()
		for range 2 {
			s.call(b, "NetworkDriver.EndpointOperInfo", map[string]any{"NetworkID": benchNetwork, "EndpointID": benchEndpoint(0)})
		}
		all = append(all, time.Since(begin))
		time.Sleep(time.Millisecond) // as long as the bare program has its turn
	}
	return median(all)
}

// bare makes veth pairs as ports of a bridge with one netlink message each,
// nothing else, in a namespace of its own.
type bare struct {
	sockets map[int]*nl.SocketHandle
	bridge  int
	next    int
}

// serveBare makes one pair for each request, on a thread of its own, and
// answers how long it took.
func serveBare(b *testing.B, requests <-chan struct{}, times chan<- time.Duration) {
	b.Helper()
	defer close(times)
	runtime.LockOSThread() //nolint:forbidigo // the thread ends with this goroutine: it is never unlocked
	ns, err := netns.New()
	if err != nil {
		b.Error(err)
		return
	}
	defer func() { _ = ns.Close() }()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		b.Error(err)
		return
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "bare"
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := errors.Join(h.LinkAdd(bridge), h.LinkSetUp(bridge)); err != nil {
		b.Error(err)
		return
	}
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		b.Error(err)
		return
	}
	defer sock.Close()
	m := &bare{sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: sock}}, bridge: bridge.Index}
	for range requests {
		begin := time.Now()
		if err := m.pair(); err != nil {
			b.Error(err)
			return
		}
		times <- time.Since(begin)
	}
}

func (m *bare) pair() error {
	m.next++
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.Sockets = m.sockets
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(fmt.Sprintf("v%d", m.next))))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(1500)))
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(m.bridge))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(fmt.Sprintf("p%d", m.next)))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(1500))
	peer.AddRtAttr(unix.IFLA_ADDRESS, []byte{2, 0x42, 10, 9, byte(m.next >> 8), byte(m.next)})
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func median(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkCreateEndpointJoin compares CreateEndpoint plus Join through the
// socket with a bare program that makes the same links, on an empty network
// and on one with 1,000 endpoints, and then times a restart with those 1,000.
// Two calls that do nothing are timed as well: what HTTP costs by itself. The
// kernel's own cost grows with the ports of a bridge, so what is ours beyond the
// bare program is compared by itself, too.
func BenchmarkCreateEndpointJoin(b *testing.B) {
	s := newPlainServe(b)
	s.start(b, "")
	defer func() { s.kill() }()
	s.waitListening(b)
	s.createNetwork(b)

	requests, times := make(chan struct{}), make(chan time.Duration)
	go serveBare(b, requests, times)
	defer close(requests)

	// A bridge has no more than 1,023 ports (BR_PORT_BITS): 20 are left to be
	// timed beyond the thousand. Ours and the bare one take turns, because a
	// pair made in a tight loop costs the kernel half of one made now and then.
	const sample, rest = 200, 20
	series := func(from, n int) (ours, theirs time.Duration) {
		var o, t []time.Duration
		for i := from; i < from+n; i++ {
			begin := time.Now()
			s.createAndJoin(b, i)
			o = append(o, time.Since(begin))
			requests <- struct{}{}
			d, ok := <-times
			if !ok {
				b.FailNow()
			}
			t = append(t, d)
		}
		return median(o), median(t)
	}
	empty, bareEmpty := series(0, sample)
	for i := sample; i < 1000; i++ {
		s.createAndJoin(b, i)
		requests <- struct{}{}
		<-times
	}
	full, bareFull := series(1000, rest)

	calls := s.idleCalls(b, sample)

	b.ReportMetric(float64(calls.Microseconds()), "two-idle-calls-us")
	b.ReportMetric(float64(empty-calls)/float64(bareEmpty), "(weft-idle)/bare")
	b.ReportMetric(float64(full-bareFull)/float64(empty-bareEmpty), "own-full/empty")
	b.ReportMetric(float64(bareEmpty.Microseconds()), "bare-us")
	b.ReportMetric(float64(empty.Microseconds()), "weft-us")
	b.ReportMetric(float64(empty)/float64(bareEmpty), "weft/bare")
	b.ReportMetric(float64(full)/float64(empty), "full/empty")
	b.ReportMetric(float64(bareFull)/float64(bareEmpty), "bare-full/empty")
	b.ReportMetric(0, "ns/op")

	// The namespace must outlive the process for the restart.
	keep := exec.Command("nsenter", "--net=/proc/"+strconv.Itoa(s.cmd.Process.Pid)+"/ns/net", "sleep", "120")
	if err := keep.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = keep.Process.Kill(); _ = keep.Wait() }()
	time.Sleep(200 * time.Millisecond) // let nsenter join before the process goes
	s.kill()
	begin := time.Now()
	s.start(b, "/proc/"+strconv.Itoa(keep.Process.Pid)+"/ns/net")
	s.firstAnswer(b)
	b.ReportMetric(float64(time.Since(begin).Milliseconds()), "restart-ms")
}

// BenchmarkIdleMemory reports the resident memory of a fresh process with one
// network, in MB.
func BenchmarkIdleMemory(b *testing.B) {
	s := newPlainServe(b)
	s.start(b, "")
	defer func() { s.kill() }()
	s.waitListening(b)
	s.createNetwork(b)
	time.Sleep(2 * time.Second)
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(kb)/1024, "RSS-MB")
			b.ReportMetric(0, "ns/op")
			return
		}
	}
	b.Fatal("no VmRSS")
}
