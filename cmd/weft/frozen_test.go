package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
	"github.com/weftnet/weft/internal/store/etcdtest"
	"github.com/weftnet/weft/ipam"
)

// frozenTime is how long a host stands still: with WEFT_SOAK a minute, after which
// whatever had a time limit has met it.
func frozenTime() time.Duration {
	if os.Getenv("WEFT_SOAK") != "" {
		return time.Minute
	}
	return 8 * time.Second
}

const frozenPool = "space=blue,10.44.0.0/22"

// sharer is a host that hands out addresses of a pool that it shares.
type sharer struct {
	*process
	t    *testing.T
	name string
}

// newSharer starts a plugin in a namespace of its own, from where etcd, which is on
// the loopback of the test's namespace, is reached at 127.0.0.1:2379.
func newSharer(t *testing.T, name, etcd string) *sharer {
	t.Helper()
	ns, dir := netnstest.New(t), t.TempDir()
	var l net.Listener
	var err error
	ns.Do(func() { l, err = net.Listen("tcp", "127.0.0.1:2379") })
	if err != nil {
		t.Fatal(err)
	}
	var pipes sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		pipes.Wait()
	})
	pipes.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", etcd)
			if err != nil {
				_ = in.Close()
				continue
			}
			pipe := func(to, from net.Conn) {
				_, _ = io.Copy(to, from) // until one end closes, or both are to
				_ = to.Close()
				_ = from.Close()
			}
			pipes.Go(func() { pipe(in, out) })
			pipes.Go(func() { pipe(out, in) })
		}
	})
	cmd := exec.Command(os.Args[0], "serve", "--socket", dir+"/p.sock", "--state", dir)
	cmd.Env = append(os.Environ(), asMain+"=1", "STORE=etcd://127.0.0.1:2379")
	s := &sharer{t: t, name: name}
	ns.Do(func() { s.process = startCmd(t, dir, cmd) })
	for i := 0; ; i++ {
		status, m := s.call(t, "IpamDriver.RequestPool", `{"AddressSpace":"weft-local","Pool":"10.44.0.0/22","SubPool":"","Options":{"space":"blue"},"V6":false}`)
		if status == http.StatusOK && m["PoolID"] == frozenPool {
			return s
		}
		if i == 50 {
			t.Fatalf("%s: %v", name, m)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// ask makes a call; answered is false if nothing came back, which is how an engine
// finds a host that stands still.
func (s *sharer) ask(method, address string) (text string, answered bool) {
	resp, err := s.client.Post("http://weft/IpamDriver."+method, "", strings.NewReader(fmt.Sprintf(`{"PoolID":%q,"Address":%q,"Options":null}`, frozenPool, address)))
	if err != nil {
		return "", false
	}
	defer func() { _ = resp.Body.Close() }()
	m, err := decoded(resp.Body)
	if err != nil {
		return "", false
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Sprint(m["Error"]), true
	}
	return fmt.Sprint(m["Address"]), true
}

// TestNamesMove plays engines of version 29 on two hosts that share a pool: a
// container that is made again on the other host has its address again there.
func TestNamesMove(t *testing.T) {
	t.Parallel()
	etcd := etcdtest.Start(t, etcdtest.Config{})
	endpoint := strings.TrimPrefix(etcd.Endpoints, "etcd://")
	alpha, beta := newSharer(t, "alpha", endpoint), newSharer(t, "beta", endpoint)
	request := func(s *sharer, name string) string {
		t.Helper()
		m := s.must(t, "IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":"","Options":{"com.docker.network.endpoint.name":%q}}`, frozenPool, name))
		return fmt.Sprint(m["Address"])
	}
	release := func(s *sharer, address string) {
		t.Helper()
		s.must(t, "IpamDriver.ReleaseAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q}`, frozenPool, strings.TrimSuffix(address, "/22")))
	}
	db := request(alpha, "db")
	release(alpha, db)
	if got := request(beta, "db"); got != db {
		t.Errorf("made again on another host it has %s, had %s", got, db)
	}
	second := request(alpha, "db")
	if second == db {
		t.Errorf("two containers have %s", db)
	}
	if said := alpha.said(); !strings.Contains(said, "is kept for db and a container of that name has it") {
		t.Errorf("the log does not say why the second one has another address: %s", said)
	}
	release(alpha, second)
	release(beta, db)
	if got := request(alpha, "db"); got != db {
		t.Errorf("made again on the first host it has %s, had %s", got, db)
	}

	// What is reserved on one host is on the other one, MAC address included.
	if _, out, errs := weft(t, "", "address", "reserve", "-space", "blue", "mail", "10.44.0.77", "02:00:00:00:00:77", "--socket", filepath.Join(alpha.dir, adminSocket)); !strings.Contains(out, "is reserved for mail") {
		t.Fatal(out, errs)
	}
	named := func() bool {
		pools := beta.status(t).Pools
		return slices.ContainsFunc(pools[0].Names, func(n ipam.NameStatus) bool { return n.Name == "mail" })
	}
	for i := 0; !named(); i++ {
		if i == 100 {
			t.Fatal("the other host does not know of a reservation")
		}
		time.Sleep(50 * time.Millisecond)
	}
	if got := request(beta, "mail"); got != "10.44.0.77/22" {
		t.Errorf("by reservation: %s", got)
	}
	beta.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{}},`+
		`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.44.0.0/22","Gateway":"10.44.0.1/22"}],"IPv6Data":[]}`)
	m := beta.must(t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(
		`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":"10.44.0.77/22","AddressIPv6":"","MacAddress":""},"Options":{}}`, netID, strings.Repeat("e", 64)))
	if mac := m["Interface"].(map[string]any)["MacAddress"]; mac != "02:00:00:00:00:77" {
		t.Errorf("its MAC address is %v", mac)
	}
	_, out, _ := weft(t, "", "status", "pools", "--socket", filepath.Join(beta.dir, adminSocket))
	for _, line := range []string{"db .* in use on ", "mail +10.44.0.77 +02:00:00:00:00:77 .* reserved, in use\n"} {
		if !regexp.MustCompile(line).MatchString(out) {
			t.Errorf("status lacks %q:\n%s", line, out)
		}
	}
}

// TestFrozen has two hosts hand out addresses of one pool while one of them stands
// still in the middle of its requests, and goes on as if nothing had happened.
func TestFrozen(t *testing.T) {
	t.Parallel()
	etcd := etcdtest.Start(t, etcdtest.Config{})
	endpoint := strings.TrimPrefix(etcd.Endpoints, "etcd://")
	hosts := []*sharer{newSharer(t, "alpha", endpoint), newSharer(t, "beta", endpoint)}
	inside := netip.MustParsePrefix("10.44.0.0/22")

	var mu sync.Mutex
	live := map[netip.Addr]*sharer{}
	answers := map[*sharer]int{}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	// worker asks, keeps some, and gives others back. An address leaves live before
	// it is released, and enters it when the grant is here.
	worker := func(s *sharer) {
		var mine []netip.Addr
		for {
			select {
			case <-stop:
				return
			default:
			}
			if len(mine) > 20 || len(mine) > 0 && rand.IntN(3) == 0 {
				n := rand.IntN(len(mine))
				a := mine[n]
				mine = append(mine[:n], mine[n+1:]...)
				mu.Lock()
				delete(live, a)
				mu.Unlock()
				s.ask("ReleaseAddress", a.String())
				continue
			}
			text, answered := s.ask("RequestAddress", "")
			p, err := netip.ParsePrefix(text)
			if !answered || err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			mu.Lock()
			if have := live[p.Addr()]; have != nil {
				t.Errorf("%s is given to %s, and %s has it", p, s.name, have.name)
			}
			if p.Bits() != 22 || !inside.Contains(p.Addr()) {
				t.Errorf("%s is not of the pool", p)
			}
			live[p.Addr()] = s
			answers[s]++
			mu.Unlock()
			mine = append(mine, p.Addr())
		}
	}
	for _, s := range hosts {
		for range 4 {
			wg.Go(func() { worker(s) })
		}
	}
	frozen, other := hosts[0], hosts[1]
	for _, still := range []time.Duration{300 * time.Millisecond, frozenTime(), time.Second} {
		time.Sleep(time.Duration(300+rand.IntN(200)) * time.Millisecond)
		if err := frozen.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		before := answers[other]
		mu.Unlock()
		time.Sleep(still)
		mu.Lock()
		meanwhile := answers[other] - before
		mu.Unlock()
		if meanwhile == 0 {
			t.Error("the other host handed out nothing meanwhile")
		}
		if err := frozen.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(500 * time.Millisecond)
	close(stop)
	wg.Wait()
	t.Logf("alpha answered %d requests, beta %d; %d are left", answers[frozen], answers[other], len(live))
	if answers[frozen] < 10 {
		t.Error("the frozen host answered hardly anything")
	}

	// What was answered is its host's own: there it is in use, elsewhere it is held.
	for a, s := range live {
		for _, h := range hosts {
			want := map[bool]string{true: "is in use", false: "is held by host"}[h == s]
			if text, _ := h.ask("RequestAddress", a.String()); !strings.Contains(text, want) {
				t.Errorf("%s of %s, asked for on %s: %s, want %q", a, s.name, h.name, text, want)
			}
		}
	}
	for a, s := range live {
		if text, answered := s.ask("ReleaseAddress", a.String()); !answered || strings.Contains(text, "address") {
			t.Errorf("release %s on %s: %s", a, s.name, text)
		}
	}
	for a, s := range live {
		h := hosts[0]
		if s == h {
			h = hosts[1]
		}
		if text, _ := h.ask("RequestAddress", a.String()); text != a.String()+"/22" {
			t.Errorf("%s, released by %s, asked for on %s: %s", a, s.name, h.name, text)
		}
	}
}
