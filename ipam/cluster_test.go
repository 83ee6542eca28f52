package ipam

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	"pgregory.net/rapid"

	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/etcdtest"
)

const blue16 = "space=blue,10.44.0.0/16"

// openEtcd opens the store of a cluster below a prefix of its own.
func openEtcd(tb testing.TB, endpoints, prefix string) *store.Etcd {
	tb.Helper()
	log := logrus.New()
	log.SetOutput(tb.Output())
	e, err := store.OpenEtcd(store.EtcdConfig{Endpoints: endpoints, Prefix: prefix, Log: log})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = e.Close() })
	return e
}

// newHost is a house that belongs to a cluster.
func newHost(tb testing.TB, name string, s cluster) *house {
	tb.Helper()
	h := &house{
		tb: tb, path: filepath.Join(tb.TempDir(), "weft.db"), held: map[netip.Prefix]string{}, name: name, shared: s,
		wrap: func(r records) records { return r },
	}
	h.start()
	tb.Cleanup(func() {
		h.stop()
		_ = h.bolt.Close()
	})
	return h
}

// newHosts are hosts named alpha, beta and gamma, on one etcd.
func newHosts(tb testing.TB, n int) (*etcdtest.Cluster, []*house) {
	tb.Helper()
	c := etcdtest.Start(tb, etcdtest.Config{})
	var all []*house
	for _, name := range []string{"alpha", "beta", "gamma"}[:n] {
		all = append(all, newHost(tb, name, openEtcd(tb, c.Endpoints, "")))
	}
	return c, all
}

// expect runs lines as "HOST: CALL -> ANSWER".
func expect(t *testing.T, all []*house, script string) {
	t.Helper()
	for line := range strings.SplitSeq(strings.TrimSpace(script), "\n") {
		call, want, _ := strings.Cut(strings.TrimSpace(line), " -> ")
		name, call, _ := strings.Cut(call, ": ")
		h := all[slices.IndexFunc(all, func(h *house) bool { return h.name == name })]
		long := func(s string) string { return strings.ReplaceAll(s, "BLUE", blue16) }
		if call == "restart" {
			h.restart()
		} else if got := h.do(long(call)); !matches(got, long(want)) {
			t.Errorf("%s\n got %s\nwant %s", line, got, long(want))
		}
	}
}

// inEtcd is what is below space/.
func inEtcd(tb testing.TB, s claims) []string {
	tb.Helper()
	list, err := s.List(tb.Context(), "")
	if err != nil {
		tb.Fatal(err)
	}
	var keys []string
	for _, r := range list {
		keys = append(keys, r.Key)
	}
	return keys
}

// soon waits until f is true.
func soon(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for start := time.Now(); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > 15*time.Second {
			tb.Fatalf("%s: not within 15 s", what)
		}
	}
}

func TestSharedSpace(t *testing.T) {
	for name, script := range map[string]string{
		"a network on three hosts": `
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: gw BLUE -> 10.44.0.1/16
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: gw BLUE -> 10.44.0.1/16
			alpha: addr BLUE -> 10.44.0.2/16
			beta: addr BLUE -> 10.44.0.3/16
			gamma: pool local 10.44.0.0/16 sub 10.44.7.0/24 space=blue -> BLUE,10.44.7.0/24
			gamma: gw BLUE,10.44.7.0/24 -> 10.44.0.1/16
			gamma: addr BLUE,10.44.7.0/24 -> 10.44.7.0/16
			beta: addr BLUE 10.44.0.2 -> error: address 10.44.0.2 of pool 10.44.0.0/16 is held by host alpha: …
			beta: addr BLUE 10.44.7.0 -> error: …is held by host gamma…
			beta: addr BLUE 10.44.0.1 -> error: …is the gateway…
			beta: addr BLUE 10.44.0.3 -> error: …is in use…
			beta: free BLUE 10.44.0.2 -> ok
			beta: free BLUE 10.44.0.1 -> ok
			gamma: addr BLUE,10.44.7.0/24 10.44.0.2 -> error: …is held by host alpha…
			alpha: free BLUE 10.44.0.2 -> ok
			gamma: addr BLUE,10.44.7.0/24 10.44.0.2 -> 10.44.0.2/16
			alpha: unpool BLUE -> ok
			beta: gw BLUE -> 10.44.0.1/16
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: gw BLUE 10.44.0.1 -> 10.44.0.1/16
			beta: addr BLUE 10.44.0.1 -> error: …is the gateway…
			alpha: unpool BLUE -> ok
			beta: unpool BLUE -> ok
			gamma: unpool BLUE,10.44.7.0/24 -> ok`,
		"what the hosts have to agree on": `
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: gw BLUE 10.44.0.254 -> 10.44.0.254/16
			beta: pool local 10.44.0.0/24 space=blue -> error: subnet 10.44.0.0/24 overlaps 10.44.0.0/16, which host alpha has in space blue: give the same subnet on every host, or choose another space
			beta: pool local 10.44.0.0/24 space=red -> space=red,10.44.0.0/24
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: gw BLUE 10.44.0.1 -> error: gateway 10.44.0.1 of pool 10.44.0.0/16 in space blue: host alpha has given it 10.44.0.254: give the same on every host, or none
			beta: gw BLUE -> 10.44.0.254/16
			alpha: pool local 10.44.0.0/16 space=blue -> error: subnet 10.44.0.0/16 is in use…
			alpha: pool local 10.44.0.0/16 sub 10.44.1.0/24 space=blue -> error: subnet 10.44.0.0/16 is in use, and a host can have one network with it in space blue, whatever the ranges: choose another subnet, or remove the network that has it
			gamma: pool local 4 space=blue -> error: ipam option space=blue: give the subnet…--subnet…
			gamma: pool local 0.0.0.0/24 space=blue -> error: …--subnet…
			gamma: pool global 10.44.0.0/16 space=blue -> error: …swarm…
			gamma: pool local 10.44.0.0/16 space=a,b -> error: ipam option space=a,b: a space has a name…
			gamma: pool local 10.44.0.0/16 space= -> error: …a space has a name…
			alpha: unpool BLUE -> ok
			beta: unpool BLUE -> ok
			beta: unpool space=red,10.44.0.0/24 -> ok`,
		"exhaustion": `
			alpha: pool local 10.44.0.0/29 space=blue -> space=blue,10.44.0.0/29
			beta: pool local 10.44.0.0/29 space=blue -> space=blue,10.44.0.0/29
			alpha: gw space=blue,10.44.0.0/29 -> 10.44.0.1/29
			alpha: addr space=blue,10.44.0.0/29 -> 10.44.0.2/29
			alpha: addr space=blue,10.44.0.0/29 -> 10.44.0.3/29
			alpha: addr space=blue,10.44.0.0/29 -> 10.44.0.4/29
			beta: addr space=blue,10.44.0.0/29 -> 10.44.0.5/29
			beta: addr space=blue,10.44.0.0/29 -> 10.44.0.6/29
			beta: addr space=blue,10.44.0.0/29 -> error: no free address left in pool 10.44.0.0/29: 6 of 6 are in use: remove a container, or make the network with a larger --subnet
			alpha: free space=blue,10.44.0.0/29 10.44.0.3 -> ok
			beta: addr space=blue,10.44.0.0/29 -> 10.44.0.3/29
			alpha: unpool space=blue,10.44.0.0/29 -> ok
			beta: unpool space=blue,10.44.0.0/29 -> ok`,
		"restarts": `
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: gw BLUE -> 10.44.0.1/16
			alpha: addr BLUE 10.44.0.9 -> 10.44.0.9/16
			alpha: addr BLUE -> 10.44.0.2/16
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: addr BLUE 10.44.1.1 -> 10.44.1.1/16
			alpha: restart
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: gw BLUE -> 10.44.0.1/16
			alpha: addr BLUE 10.44.0.9 -> 10.44.0.9/16
			alpha: addr BLUE 10.44.0.9 -> error: …is in use…
			alpha: addr BLUE 10.44.1.1 -> error: …is held by host beta…
			alpha: addr BLUE -> 10.44.0.3/16
			beta: restart
			beta: free BLUE 10.44.1.1 -> ok
			beta: free BLUE 10.44.1.1 -> ok
			alpha: addr BLUE 10.44.1.1 -> 10.44.1.1/16
			beta: unpool BLUE -> ok
			beta: unpool BLUE -> ok
			alpha: restart
			alpha: unpool BLUE -> ok`,
		"IPv6, and a pool that the engine knows and we do not": `
			alpha: addr space=blue,fd44::/64 -> fd44::1/64
			beta: addr space=blue,fd44::/64 -> fd44::2/64
			beta: addr space=blue,fd44::/64 fd44::1 -> error: …fd44::1…is held by host alpha…
			gamma: free space=blue,fd44::/64 fd44::1 -> ok
			gamma: unpool space=blue,fd44::/64 -> ok
			alpha: unpool space=blue,fd44::/64 -> ok
			beta: unpool space=blue,fd44::/64 -> ok`,
	} {
		t.Run(name, func(t *testing.T) {
			_, all := newHosts(t, 3)
			expect(t, all, script)
			nothingLeft(t, all)
		})
	}
}

// TestNoCluster: what is shared is refused, and what to do is said.
func TestNoCluster(t *testing.T) {
	h := newHouse(t)
	for _, l := range []string{"pool local 10.44.0.0/16 space=blue", "addr " + blue16} {
		if got := h.do(l); !strings.HasPrefix(got, "error: ") || !strings.Contains(got, "set STORE=etcd://host:2379") {
			t.Errorf("%s: %s", l, got)
		}
	}
}

func TestSharedStatus(t *testing.T) {
	_, all := newHosts(t, 2)
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 sub 10.44.1.0/24 space=blue -> BLUE,10.44.1.0/24
		alpha: gw BLUE,10.44.1.0/24 -> 10.44.0.1/16
		alpha: addr BLUE,10.44.1.0/24 -> 10.44.1.0/16
		beta: pool local 10.44.0.0/16 space=blue -> BLUE
		beta: addr BLUE -> 10.44.0.2/16
		beta: addr BLUE -> 10.44.0.3/16`)
	want := PoolStatus{
		ID: blue16 + ",10.44.1.0/24", Space: "blue", Pool: "10.44.0.0/16", SubPool: "10.44.1.0/24", Size: "65534", Used: 1, UsedByAll: 4, Gateway: "10.44.0.1",
	}
	for range 2 { // the same after a restart
		soon(t, "what beta has", func() bool {
			s := all[0].Status(t.Context())
			return len(s.Pools) == 1 && cmp.Diff(want, s.Pools[0]) == ""
		})
		all[0].restart()
	}
}

// TestDeadHost: an operator frees the address of a host that will not come back.
func TestDeadHost(t *testing.T) {
	_, all := newHosts(t, 2)
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 space=blue -> BLUE
		beta: pool local 10.44.0.0/16 space=blue -> BLUE
		beta: addr BLUE 10.44.0.9 for db -> 10.44.0.9/16`)
	soon(t, "what beta has", func() bool { return all[0].Status(t.Context()).Pools[0].UsedByAll == 1 })
	all[1].stop()
	all[1].stop = func() {}
	o := Order{Do: "release", Space: "blue", Address: netip.MustParseAddr("10.44.0.9")}
	if _, err := all[0].Carry(t.Context(), o); err == nil || !strings.Contains(err.Error(), "is held by host beta: if that host will never come back, repeat with -force") {
		t.Error(err)
	}
	o.Force = true
	if done, err := all[0].Carry(t.Context(), o); err != nil || done != "address 10.44.0.9 of pool 10.44.0.0/16 is free; it was held by host beta" {
		t.Error(done, err)
	}
	soon(t, "that it is free", func() bool { return all[0].Status(t.Context()).Pools[0].UsedByAll == 0 })
	expect(t, all, `
		alpha: addr BLUE -> 10.44.0.1/16
		alpha: addr BLUE for db -> 10.44.0.9/16`)
}

// TestSharedConcurrent: no address is given to two, whoever asks where.
func TestSharedConcurrent(t *testing.T) {
	_, all := newHosts(t, 3)
	var mu sync.Mutex
	owner := map[string]string{}
	var wg sync.WaitGroup
	for _, h := range all {
		wg.Go(func() { // the gateways too
			h.do("pool local 10.44.0.0/22 space=blue")
			if got := h.do("gw space=blue,10.44.0.0/22"); got != "10.44.0.1/22" {
				t.Errorf("gateway on %s: %s", h.name, got)
			}
		})
	}
	wg.Wait()
	for _, h := range all {
		for c := range 6 {
			wg.Go(func() {
				const id = "space=blue,10.44.0.0/22"
				for n := range 40 {
					line := "addr " + id
					if n%4 == 0 {
						line = fmt.Sprintf("addr %s 10.44.3.%d", id, n+1)
					}
					a := h.do(line)
					if strings.HasPrefix(a, "error") {
						if n%4 != 0 || !strings.Contains(a, "is held by") && !strings.Contains(a, "in use") {
							t.Errorf("%s: %s: %s", h.name, line, a)
						}
						continue
					}
					mu.Lock()
					if o, ok := owner[a]; ok {
						t.Errorf("%s given to %s and %s", a, o, h.name)
					}
					owner[a] = fmt.Sprint(h.name, c)
					if n%2 == 0 {
						delete(owner, a)
					}
					mu.Unlock()
					if n%2 == 0 {
						if got := h.do("free " + id + " " + strings.Split(a, "/")[0]); got != "ok" {
							t.Errorf("free %s: %s", a, got)
						}
					}
				}
			})
		}
	}
	wg.Wait()
	list, err := all[0].shared.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	// What was asked for by number is kept.
	list = slices.DeleteFunc(list, func(r store.Record) bool { return decodeClaim(r).Kind == kindKept })
	if n := len(list); n != len(owner)+2 { // the table and the gateway
		t.Errorf("%d records in etcd for %d addresses", n, len(owner))
	}
	for _, h := range all {
		want := uint64(len(owner) + 1)
		soon(t, "what is known on "+h.name, func() bool { return h.Status(t.Context()).Pools[0].UsedByAll == want })
	}
	for _, h := range all {
		if got := h.do("unpool space=blue,10.44.0.0/22"); got != "ok" {
			t.Error(got)
		}
	}
	if left := inEtcd(t, all[0].shared); len(left) > 0 {
		t.Errorf("left in etcd: %v", left)
	}
}

// TestGatewayRace: hosts that choose at the same time have one answer, also
// where they were told different things.
func TestGatewayRace(t *testing.T) {
	_, all := newHosts(t, 3)
	for n := range 20 {
		id := fmt.Sprintf("space=blue,10.%d.0.0/24", n)
		answers := make([]string, 3)
		var wg sync.WaitGroup
		for i, h := range all {
			wg.Go(func() {
				h.do(fmt.Sprintf("pool local 10.%d.0.0/24 space=blue", n))
				want := ""
				if i == n%3 {
					want = fmt.Sprintf(" 10.%d.0.254", n)
				}
				answers[i] = h.do("gw " + id + want)
			})
		}
		wg.Wait()
		good := slices.DeleteFunc(slices.Clone(answers), func(a string) bool { return strings.Contains(a, "give the same on every host") })
		if len(good) < 2 || len(slices.Compact(good)) != 1 || strings.HasPrefix(good[0], "error") {
			t.Errorf("round %d: %q", n, answers)
		}
		for _, h := range all {
			h.do("unpool " + id)
		}
		if left := inEtcd(t, all[0].shared); len(left) > 0 {
			t.Fatalf("round %d: left in etcd: %v", n, left)
		}
	}
}

// proxy is between a host and etcd, and can be cut: what passes hangs, and
// nobody is told.
type proxy struct {
	at  string
	mu  sync.Mutex
	cut bool
	all []net.Conn
}

func newProxy(tb testing.TB, endpoints string) *proxy {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &proxy{at: l.Addr().String()}
	tb.Cleanup(func() {
		_ = l.Close()
		p.set(false)
	})
	to := strings.TrimPrefix(endpoints, "etcd://")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d, err := net.Dial("tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			p.mu.Lock()
			p.all = append(p.all, c, d)
			p.mu.Unlock()
			go p.copy(c, d)
			go p.copy(d, c)
		}
	}()
	return p
}

func (p *proxy) copy(to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			_ = to.Close()
			return
		}
		p.mu.Lock()
		cut := p.cut
		p.mu.Unlock()
		if cut {
			_, _ = io.Copy(io.Discard, from) // until the connection is given up
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// set cuts the connections, or lets new ones pass.
func (p *proxy) set(cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = cut
	if !cut {
		for _, c := range p.all {
			_ = c.Close()
		}
		p.all = nil
	}
}

// TestCutOff: a host that cannot reach etcd says so in time, keeps what it has,
// and finishes its releases when it is back, also after a restart.
func TestCutOff(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Config{})
	p := newProxy(t, c.Endpoints)
	all := []*house{newHost(t, "alpha", openEtcd(t, "etcd://"+p.at, "")), newHost(t, "beta", openEtcd(t, c.Endpoints, ""))}
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: gw BLUE -> 10.44.0.1/16
		alpha: addr BLUE -> 10.44.0.2/16
		alpha: addr BLUE -> 10.44.0.3/16
		alpha: addr BLUE -> 10.44.0.4/16
		beta: pool local 10.44.0.0/16 space=blue -> BLUE`)
	p.set(true)
	timed := func(line, want string) {
		t.Helper()
		start := time.Now()
		if got := all[0].do(line); !matches(got, want) {
			t.Errorf("%s: %s", line, got)
		}
		if d := time.Since(start); d > 9500*time.Millisecond {
			t.Errorf("%s: took %v", line, d)
		}
	}
	var wg sync.WaitGroup
	for _, l := range []string{"addr " + blue16, "addr " + blue16 + " 10.44.0.77", "free " + blue16 + " 10.44.0.2"} {
		wg.Go(func() { timed(l, "error: …etcd at…does not answer…") })
	}
	wg.Wait()
	expect(t, all, `
		beta: addr BLUE 10.44.0.2 -> error: …is held by host alpha…
		beta: addr BLUE 10.44.0.3 -> error: …is held by host alpha…`)
	all[0].restart() // without etcd
	timed("free "+blue16+" 10.44.0.3", "error: …etcd at…")
	timed("addr "+blue16, "error: address in pool 10.44.0.0/16 of space blue: …etcd at…")
	p.set(false)
	for _, a := range []string{"10.44.0.2", "10.44.0.3"} {
		soon(t, "the release of "+a, func() bool { return all[1].do("addr "+blue16+" "+a) == a+"/16" })
	}
	expect(t, all, `
		beta: addr BLUE 10.44.0.4 -> error: …is held by host alpha…
		alpha: addr BLUE 10.44.0.2 -> error: …is held by host beta…
		alpha: addr BLUE 10.44.0.99 -> 10.44.0.99/16`)
	if left, err := all[0].bolt.List(t.Context(), owedKeys); err != nil || len(left) > 0 {
		t.Errorf("still owed: %v, %v", left, err)
	}
	// The network goes while etcd is away, and the plugin is restarted.
	p.set(true)
	timed("unpool "+blue16, "error: …etcd at…")
	all[0].restart()
	p.set(false)
	soon(t, "the release of the pool", func() bool {
		return len(all[0].Status(t.Context()).Pools) == 0 && !strings.Contains(fmt.Sprint(inEtcd(t, all[1].shared)), "10.44.0.99")
	})
	if got := all[1].do("unpool " + blue16); got != "ok" {
		t.Error(got)
	}
	if left := inEtcd(t, all[1].shared); len(left) > 0 {
		t.Errorf("left in etcd: %v", left)
	}
}

// TestLeaderKilled: requests go on, and each has a clear end.
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	var all []*house
	for _, name := range []string{"alpha", "beta"} {
		all = append(all, newHost(t, name, openEtcd(t, c.Endpoints, "")))
	}
	var mu sync.Mutex
	owner := map[string]string{}
	failed := 0
	var wg sync.WaitGroup
	for _, h := range all {
		h.do("pool local 10.44.0.0/16 space=blue")
		for range 4 {
			wg.Go(func() {
				for stop := time.Now().Add(6 * time.Second); time.Now().Before(stop); {
					a := h.do("addr " + blue16)
					mu.Lock()
					if strings.HasPrefix(a, "error") {
						failed++
					} else if o, ok := owner[a]; ok {
						t.Errorf("%s given to %s and %s", a, o, h.name)
					} else {
						owner[a] = h.name
					}
					mu.Unlock()
				}
			})
		}
	}
	time.Sleep(time.Second)
	lead := c.Leader()
	c.Kill(lead)
	time.Sleep(2 * time.Second)
	c.Start(lead)
	wg.Wait()
	t.Logf("%d addresses, %d requests failed", len(owner), failed)
	soon(t, "as many records as addresses", func() bool { return len(inEtcd(t, all[0].shared)) == len(owner)+1 })
	for _, h := range all {
		if got := h.do("unpool " + blue16); got != "ok" {
			t.Error(got)
		}
	}
	if left := inEtcd(t, all[0].shared); len(left) > 0 {
		t.Errorf("%d left in etcd", len(left))
	}
}

// shaky is a cluster's store in which one write has an outcome of our choice.
type shaky struct {
	cluster
	n    atomic.Int64
	at   int64  // which call; -1: none
	mode string // as in faulty; "late": it lands when land is called, and so do all that follow; "late once"

	mu      sync.Mutex
	late    []func()
	dead    bool
	removed func() // happens after a Remove, before its caller goes on
}

func (s *shaky) call(do func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.n.Add(1) - 1
	if s.dead {
		return errDisk
	}
	if n != s.at {
		s.mu.Unlock()
		defer s.mu.Lock()
		return do()
	}
	s.dead = strings.HasPrefix(s.mode, "crash")
	switch s.mode {
	case "fail", "crash before":
		return errDisk
	case "late", "late once":
		s.late = append(s.late, func() { _ = do() })
		if s.mode == "late" {
			s.at = n + 1
		}
	case "uncertain after", "crash after":
		_ = do()
	}
	return fmt.Errorf("%w: %w", store.ErrUncertain, errDisk)
}

func (s *shaky) Put(ctx context.Context, r store.Record) (out store.Record, err error) {
	err = s.call(func() error { out, err = s.cluster.Put(context.WithoutCancel(ctx), r); return err })
	return out, err
}

func (s *shaky) Remove(ctx context.Context, r store.Record) error {
	err := s.call(func() error { return s.cluster.Remove(context.WithoutCancel(ctx), r) })
	s.mu.Lock()
	removed := s.removed
	s.removed = nil
	s.mu.Unlock()
	if removed != nil {
		removed()
	}
	return err
}

// trouble makes the next call fail.
func (s *shaky) trouble(mode string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode, s.at = mode, s.n.Load()
}

func (s *shaky) died() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

// calm ends the trouble.
func (s *shaky) calm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.dead = -1, false
}

// land lets come to pass what was late.
func (s *shaky) land() {
	s.mu.Lock()
	late := s.late
	s.late = nil
	s.mu.Unlock()
	for _, do := range late {
		do()
	}
}

// TestFailEveryWriteOnce: whatever write fails, in whatever way, nothing that
// was granted is given to the other host, and nothing is left in the end.
func TestFailEveryWriteOnce(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Config{})
	for _, mode := range []string{"fail", "uncertain before", "uncertain after", "crash before", "crash after"} {
		at := int64(0)
		for ; ; at++ {
			prefix := fmt.Sprintf("/%s/%d/", mode, at)
			s := &shaky{cluster: openEtcd(t, c.Endpoints, prefix), at: at, mode: mode}
			alpha, beta := newHost(t, "alpha", s), newHost(t, "beta", openEtcd(t, c.Endpoints, prefix))
			got := map[string]string{}
			hit := false
			for _, l := range []string{
				"pool local 10.44.0.0/24 space=blue", "gw ID", "addr ID", "addr ID 10.44.0.9", "addr ID", "free ID 10.44.0.9",
				"addr ID 10.44.0.8 for db", "free ID 10.44.0.8", "addr ID for db", "free ID 10.44.0.8", "unpool ID",
			} {
				if l == "unpool ID" { // what the other host sees before it
					beta.do("pool local 10.44.0.0/24 space=blue")
					if a := beta.do("addr space=blue,10.44.0.0/24 for db"); !hit && a != "10.44.0.8/24" || got[a] != "" {
						t.Errorf("%s at %d: db has %s on the other host", mode, at, a)
					}
					if gw := beta.do("gw space=blue,10.44.0.0/24"); gw != "10.44.0.1/24" {
						t.Errorf("%s at %d: gateway %s", mode, at, gw)
					}
					for a, by := range got {
						if a, _, _ := strings.Cut(a, "/"); by != "gw ID" {
							if refused := beta.do("addr space=blue,10.44.0.0/24 " + a); !strings.Contains(refused, "alpha") {
								t.Errorf("%s at %d: %s of alpha, asked for by beta: %s", mode, at, a, refused)
							}
						}
					}
				}
				l = strings.ReplaceAll(l, "ID", "space=blue,10.44.0.0/24")
				a := alpha.do(l)
				if strings.HasPrefix(a, "error") {
					if hit {
						t.Errorf("%s at %d: %s: %s", mode, at, l, a)
					}
					hit = true
					dead := s.died()
					s.calm()
					if dead {
						alpha.restart()
					}
					if !strings.HasPrefix(l, "free") && !strings.HasPrefix(l, "unpool") {
						a = alpha.do(l)
					}
				}
				if f, ok := strings.CutPrefix(l, "free space=blue,10.44.0.0/24 "); ok {
					delete(got, f+"/24") // the engine never asks again
				}
				if l == "addr space=blue,10.44.0.0/24 for db" && !hit && a != "10.44.0.8/24" {
					t.Errorf("%s at %d: db has %s, had 10.44.0.8", mode, at, a)
				}
				if strings.Contains(a, "/24") && !strings.HasPrefix(l, "pool") {
					if by, ok := got[a]; ok && !strings.HasPrefix(l, "gw") {
						t.Errorf("%s at %d: %s given for %s and %s", mode, at, a, by, l)
					}
					got[a] = strings.ReplaceAll(l, "space=blue,10.44.0.0/24", "ID")
				}
			}
			reached := s.n.Load() > at
			s.calm()
			soon(t, "alpha is out", func() bool { return len(alpha.Status(t.Context()).Pools) == 0 })
			beta.do("unpool space=blue,10.44.0.0/24")
			soon(t, fmt.Sprintf("%s at %d: nothing is left in etcd", mode, at), func() bool { return len(inEtcd(t, beta.shared)) == 0 })
			soon(t, fmt.Sprintf("%s at %d: nothing is left on disk", mode, at), func() bool {
				left, err := alpha.left()
				return err == nil && len(left) == 0
			})
			if !reached {
				break
			}
		}
		if at < 8 {
			t.Errorf("%s: the scenario makes only %d writes", mode, at)
		}
	}
}

// TestLateWrites: a write whose outcome was unknown lands when all is over.
func TestLateWrites(t *testing.T) {
	_, all := newHosts(t, 2)
	s := &shaky{cluster: all[0].shared, at: -1, mode: "late"}
	alpha, beta := newHost(t, "gamma", s), all[1]
	const red16 = "space=red,10.44.0.0/16"
	blue, _ := parsePoolID(blue16)
	red, _ := parsePoolID(red16)
	for _, h := range []*house{alpha, beta} {
		h.do("pool local 10.44.0.0/16 space=blue")
	}
	// Asked with less time than the engine gives.
	address := func(t *testing.T, a string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := alpha.requestAddress(ctx, addressRequest{id: blue, want: netip.MustParseAddr(a), kind: kindExplicit})
		if !errors.Is(err, store.ErrUncertain) {
			t.Fatal(err)
		}
		s.calm()
	}
	reference := func(t *testing.T) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := alpha.requestPool(ctx, poolRequest{poolID: red}); !errors.Is(err, store.ErrUncertain) {
			t.Fatal(err)
		}
		s.calm()
		soon(t, "the pool is released", func() bool { return alpha.pool(red.poolKey) == nil })
	}
	must := func(t *testing.T, h *house, line, want string) {
		t.Helper()
		if got := h.do(line); got != want {
			t.Fatalf("%s: %s, want %s", line, got, want)
		}
	}
	gone := func(t *testing.T, a string) {
		t.Helper()
		s.land()
		soon(t, "what landed is gone", func() bool { return beta.do("addr "+blue16+" "+a) == a+"/16" })
	}
	redGone := func(t *testing.T) {
		t.Helper()
		soon(t, "what landed is gone", func() bool { return !strings.Contains(fmt.Sprint(inEtcd(t, s)), "space/red") })
	}

	t.Run("address", func(t *testing.T) {
		s.trouble("late")
		address(t, "10.44.0.7")
		soon(t, "the address is free again", func() bool { return !alpha.pool(blue.poolKey).has("10.44.0.7") })
		gone(t, "10.44.0.7")
	})
	t.Run("address, repeated and released", func(t *testing.T) {
		s.trouble("late once")
		must(t, alpha, "addr "+blue16+" 10.44.0.8", "10.44.0.8/16")
		must(t, alpha, "free "+blue16+" 10.44.0.8", "ok")
		gone(t, "10.44.0.8")
	})
	t.Run("reference", func(t *testing.T) {
		s.trouble("late")
		reference(t)
		s.land()
		redGone(t)
	})
	t.Run("reference, repeated and released", func(t *testing.T) {
		s.trouble("late once")
		must(t, alpha, "pool local 10.44.0.0/16 space=red", red16)
		must(t, alpha, "unpool "+red16, "ok")
		s.land()
		redGone(t)
	})
	t.Run("reference, again when it is just given up", func(t *testing.T) {
		s.trouble("late")
		reference(t)
		done := make(chan struct{})
		s.mu.Lock()
		late := s.late
		s.late = nil
		s.removed = func() {
			defer close(done)
			late[1]()
			time.Sleep(200 * time.Millisecond) // alpha hears of it
		}
		s.mu.Unlock()
		late[0]()
		<-done
		redGone(t)
	})
	t.Run("address of a pool that was released", func(t *testing.T) {
		s.trouble("late")
		address(t, "10.44.0.9")
		must(t, alpha, "unpool "+blue16, "ok")
		gone(t, "10.44.0.9")
	})
}

func (p *pool) has(a string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken.has(netip.MustParseAddr(a))
}

// TestClusterLosesData: hosts write again what their containers have, before
// anybody else gets it.
func TestClusterLosesData(t *testing.T) {
	c, all := newHosts(t, 2)
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: gw BLUE -> 10.44.0.1/16
		alpha: addr BLUE -> 10.44.0.2/16
		alpha: addr BLUE 10.44.0.9 for db -> 10.44.0.9/16
		alpha: reserve blue 10.44.0.8 web -> address 10.44.0.8…`)
	before := inEtcd(t, all[0].shared)
	if _, err := c.Client().Delete(t.Context(), "/weft/v1/space/blue/addr/10.44.0.0/16/10.44.0.9"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Client().Delete(t.Context(), "/weft/v1/space/blue/pools"); err != nil {
		t.Fatal(err)
	}
	soon(t, "all is there again", func() bool { return cmp.Diff(before, inEtcd(t, all[0].shared)) == "" })
	expect(t, all, `
		beta: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: free BLUE 10.44.0.9 -> ok`)
	all[1].knowsNames("db 10.44.0.9 -, web 10.44.0.8 -") // all of it
	expect(t, all, `
		beta: unpool BLUE -> ok
		alpha: unpool BLUE -> ok`)
	if left := inEtcd(t, all[0].shared); len(left) > 0 {
		t.Errorf("left in etcd: %v", left)
	}
}

// TestSharedModel makes random calls on three hosts, which crash now and then
// in the middle of a write, and compares with who has what on paper.
func TestSharedModel(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Config{})
	round := 0
	rapid.Check(t, func(r *rapid.T) {
		if round++; round > 30 {
			return // each takes more than half a second
		}
		prefix := fmt.Sprintf("/model/%d/", round)
		id, _ := parsePoolID("space=blue,10.44.0.0/28")
		var all []*house
		var shakes []*shaky
		for _, name := range []string{"alpha", "beta", "gamma"} {
			s := &shaky{cluster: openEtcd(t, c.Endpoints, prefix), at: -1}
			h := newHost(t, name, s)
			if got := h.do("pool local 10.44.0.0/28 space=blue"); got != id.String() {
				r.Fatal(got)
			}
			all, shakes = append(all, h), append(shakes, s)
		}
		owner := map[netip.Addr]int{}
		bound := map[string]netip.Addr{} // as far as that is certain
		doubtful := map[string]bool{"": true}
		clear := true // nothing was stranded by a crash
		host := rapid.IntRange(0, 2)
		address := rapid.Custom(func(r *rapid.T) netip.Addr {
			return netip.AddrFrom4([4]byte{10, 44, 0, byte(rapid.IntRange(1, 14).Draw(r, "address"))})
		})
		ask := func(r *rapid.T, want netip.Addr) {
			n := host.Draw(r, "host")
			crash := rapid.SampledFrom([]string{"", "", "", "", "uncertain before", "uncertain after", "crash before", "crash after"}).Draw(r, "fault")
			s := shakes[n]
			if crash != "" {
				s.trouble(crash)
			}
			k := kindAuto
			if want.IsValid() {
				k = kindExplicit
			}
			name := rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(r, "name")
			kept := bound[name]
			if kept.IsValid() { // a host that has not heard of it yet gives another one
				soon(t, all[n].name+" knows of "+name, func() bool {
					p := all[n].pool(id.poolKey)
					if p == nil {
						return false // it was restarted just now
					}
					p.mu.Lock()
					defer p.mu.Unlock()
					return p.byName[name] != nil && p.byName[name].Address == kept
				})
			}
			_, second := owner[kept]
			a, err := all[n].requestAddress(t.Context(), addressRequest{id: id, want: want, kind: k, name: name})
			if err != nil && crash != "" { // it may have been carried out, and be undone later
				doubtful[name] = true
				delete(bound, name)
				maps.DeleteFunc(bound, func(_ string, b netip.Addr) bool {
					_, held := owner[b]
					return !held && (b == want || !want.IsValid() && len(owner)+len(bound) > 10)
				})
			}
			if s.died() {
				clear = false
				s.calm()
				all[n].restart()
			}
			s.calm()
			_, taken := owner[want]
			switch {
			case err == nil && want.IsValid() && a.Addr() != want:
				r.Fatalf("asked for %s, got %s", want, a)
			case err == nil:
				if by, ok := owner[a.Addr()]; ok {
					r.Fatalf("%s given to %d, which %d has", a, n, by)
				}
				if kept.IsValid() && !second && !want.IsValid() && clear && a.Addr() != kept {
					r.Fatalf("%s on %d: %s, and %s is kept for it", name, n, a, kept)
				}
				owner[a.Addr()] = n
				maps.DeleteFunc(bound, func(_ string, b netip.Addr) bool { return b == a.Addr() })
				if !doubtful[name] && !second {
					bound[name] = a.Addr()
				}
			case clear && want.IsValid() && !taken, clear && !want.IsValid() && len(owner) < 14:
				r.Fatalf("%v on %d: refused: %v", want, n, err)
			}
		}
		r.Repeat(map[string]func(*rapid.T){
			"next":    func(r *rapid.T) { ask(r, netip.Addr{}) },
			"address": func(r *rapid.T) { ask(r, address.Draw(r, "want")) },
			"release": func(r *rapid.T) {
				n, a := host.Draw(r, "host"), address.Draw(r, "which")
				if err := all[n].releaseAddress(t.Context(), id, a); err != nil {
					r.Fatal(err)
				}
				if by, ok := owner[a]; ok && by == n {
					delete(owner, a)
				}
			},
			"restart": func(r *rapid.T) { all[host.Draw(r, "host")].restart() },
			"": func(r *rapid.T) {
				list, err := shakes[0].List(t.Context(), id.claims())
				if err != nil {
					r.Fatal(err)
				}
				_, held, _ := readSpaces(list)
				used := 0
				for _, h := range held[id.poolKey] {
					if h.Kind != kindKept {
						used++
					}
				}
				for a, n := range owner {
					if got := held[id.poolKey][a].Name; got != all[n].name {
						r.Fatalf("%s is that of %s in etcd, not of %s", a, got, all[n].name)
					}
				}
				if clear && used != len(owner) {
					r.Fatalf("%d records for %d addresses", used, len(owner))
				}
				for name, a := range bound {
					if got := held[id.poolKey][a].Owner; got != name {
						r.Fatalf("%s is kept for %q in etcd, not for %s", a, got, name)
					}
				}
			},
		})
		for n, h := range all {
			h.stop()
			h.stop = func() {}
			_ = h.bolt.Close()
			_ = shakes[n].cluster.(*store.Etcd).Close()
		}
	})
}

func FuzzSpaceKey(f *testing.F) {
	for _, s := range []string{"space/blue/pools", "space/blue/addr/10.44.0.0/16/10.44.0.5", "space/blue/pool/fd44::/64", "space//pools", "space/blue/addr/10.44.0.0/16/fd00::1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		k, a, ok := parseSpaceKey(key)
		if ok && key != k.table() && key != k.owed() && key != k.claim(a) {
			t.Errorf("%q was read as %v %v", key, k, a)
		}
	})
}
