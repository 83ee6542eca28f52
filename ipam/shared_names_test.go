package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/store/etcdtest"
)

// names is what status says of the names of the first pool: NAME ADDRESS, and
// HOST where another one has it, or - where nobody has.
func (h *house) names() string {
	var all []string
	for _, n := range h.Status(h.tb.Context()).Pools[0].Names {
		s := n.Name + " " + n.Address.String()
		if n.Host != "" {
			s += " " + n.Host
		}
		if !n.Held {
			s += " -"
		}
		all = append(all, s)
	}
	return strings.Join(all, ", ")
}

// usedByAll is how many addresses of the first pool are taken.
func (h *house) usedByAll() string {
	return strconv.FormatUint(h.Status(h.tb.Context()).Pools[0].UsedByAll, 10)
}

// knowsNames waits until a host knows of exactly these names.
func (h *house) knowsNames(want string) {
	h.tb.Helper()
	start := time.Now()
	for h.names() != want {
		if time.Since(start) > 10*time.Second {
			h.tb.Fatalf("%s knows %q, want %q", h.name, h.names(), want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestSharedNames(t *testing.T) {
	for name, script := range map[string]string{
		"from host to host": `
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: addr BLUE for db -> 10.44.0.1/16
			alpha: addr BLUE for /web -> 10.44.0.2/16
			beta: knows db 10.44.0.1 alpha, web 10.44.0.2 alpha
			alpha: free BLUE 10.44.0.1 -> ok
			beta: addr BLUE for db -> 10.44.0.1/16
			alpha: addr BLUE 10.44.0.1 -> error: …is held by host beta…
			alpha: knows db 10.44.0.1 beta, web 10.44.0.2
			alpha: addr BLUE for db -> 10.44.0.3/16
			beta: free BLUE 10.44.0.1 -> ok
			alpha: free BLUE 10.44.0.3 -> ok
			alpha: free BLUE 10.44.0.2 -> ok
			gamma: pool local 10.44.0.0/16 space=blue -> BLUE
			gamma: knows db 10.44.0.1 -, web 10.44.0.2 -
			gamma: addr BLUE -> 10.44.0.3/16
			gamma: addr BLUE for other -> 10.44.0.4/16
			gamma: addr BLUE for db -> 10.44.0.1/16
			gamma: free BLUE 10.44.0.1 -> ok
			alpha: restart
			alpha: addr BLUE for db -> 10.44.0.1/16
			alpha: restart
			beta: knows db 10.44.0.1 alpha, other 10.44.0.4 gamma, web 10.44.0.2 -
			beta: restart
			beta: addr BLUE for web -> 10.44.0.2/16
			alpha: unpool BLUE -> ok
			beta: free BLUE 10.44.0.2 -> ok
			beta: unpool BLUE -> ok
			gamma: addr BLUE for web -> 10.44.0.2/16
			gamma: unpool BLUE -> ok`,
		"another address by hand": `
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: addr BLUE for db -> 10.44.0.1/16
			alpha: free BLUE 10.44.0.1 -> ok
			beta: knows db 10.44.0.1 -
			beta: addr BLUE 10.44.0.9 for db -> 10.44.0.9/16
			alpha: knows db 10.44.0.9 beta
			gamma: pool local 10.44.0.0/16 space=blue -> BLUE
			gamma: addr BLUE -> 10.44.0.1/16
			gamma: unpool BLUE -> ok
			alpha: addr BLUE 10.44.0.1 for web -> 10.44.0.1/16
			beta: free BLUE 10.44.0.9 -> ok
			alpha: free BLUE 10.44.0.1 -> ok
			beta: knows db 10.44.0.9 -, web 10.44.0.1 -
			beta: addr BLUE 10.44.0.1 -> 10.44.0.1/16
			alpha: knows db 10.44.0.9 -
			alpha: forget blue db -> nothing is kept for db in pool 10.44.0.0/16
			beta: knows 
			alpha: addr BLUE for db -> 10.44.0.2/16
			beta: knows db 10.44.0.2 alpha
			beta: forget blue 10.44.0.2 -> nothing is kept for db in pool 10.44.0.0/16
			alpha: knows 
			alpha: free BLUE 10.44.0.2 -> ok
			beta: knows 
			alpha: unpool BLUE -> ok
			beta: unpool BLUE -> ok`,
		"reserved": `
			alpha: pool local 10.44.0.0/16 space=blue reserve.db=10.44.0.1,02:00:00:00:00:01 quarantine=0 -> BLUE
			beta: pool local 10.44.0.0/16 space=blue reserve.db=10.44.0.9 -> error: subnet 10.44.0.0/16 in space blue: host alpha has it with quarantine=0, reserve.db=10.44.0.1,02:00:00:00:00:01, and here it is to have reserve.db=10.44.0.9: give the same --ipam-opt on every host, or only on the first
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: addr BLUE -> 10.44.0.2/16
			beta: addr BLUE 10.44.0.1 for web -> error: address 10.44.0.1 of pool 10.44.0.0/16 is reserved for db…
			beta: addr BLUE for db -> 10.44.0.1/16
			alpha: knows db 10.44.0.1 beta
			alpha: addr BLUE for db -> 10.44.0.3/16
			beta: free BLUE 10.44.0.1 -> ok
			alpha: free BLUE 10.44.0.3 -> ok
			alpha: addr BLUE for db -> 10.44.0.1/16
			beta: addr BLUE for web -> 10.44.0.3/16
			beta: free BLUE 10.44.0.3 -> ok
			beta: reserve blue 10.44.0.3 mail -> address 10.44.0.3 of pool 10.44.0.0/16 is reserved for mail
			alpha: knows db 10.44.0.1, mail 10.44.0.3 -
			alpha: reserve blue 10.44.0.3 web -> error: …is reserved for mail: …
			alpha: reserve blue 10.44.0.1 mail -> error: …is reserved for db…
			alpha: addr BLUE for web -> 10.44.0.4/16
			alpha: restart
			alpha: addr BLUE for mail -> 10.44.0.3/16
			alpha: free BLUE 10.44.0.3 -> ok
			gamma: pool local 10.44.0.0/16 space=blue -> BLUE
			gamma: addr BLUE for mail -> 10.44.0.3/16
			gamma: forget blue db -> error: db has an address of pool 10.44.0.0/16 by the network's option reserve.db…
			gamma: forget blue mail -> nothing is kept for mail in pool 10.44.0.0/16
			alpha: knows db 10.44.0.1, web 10.44.0.4
			alpha: unpool BLUE -> ok
			beta: unpool BLUE -> ok
			gamma: unpool BLUE -> ok
			gamma: pool local 10.44.0.0/16 space=blue -> BLUE
			gamma: addr BLUE for db -> 10.44.0.1/16
			gamma: unpool BLUE -> ok`,
		"a pool that is full": `
			alpha: pool local 10.44.0.0/29 space=blue -> P29
			beta: pool local 10.44.0.0/29 space=blue -> P29
			alpha: addr P29 for a -> 10.44.0.1/29
			alpha: addr P29 for b -> 10.44.0.2/29
			alpha: addr P29 for c -> 10.44.0.3/29
			alpha: free P29 10.44.0.2 -> ok
			alpha: free P29 10.44.0.1 -> ok
			beta: knows a 10.44.0.1 -, b 10.44.0.2 -, c 10.44.0.3 alpha
			beta: addr P29 -> 10.44.0.4/29
			beta: addr P29 -> 10.44.0.5/29
			beta: addr P29 -> 10.44.0.6/29
			beta: addr P29 -> 10.44.0.2/29
			beta: addr P29 for a -> 10.44.0.1/29
			beta: addr P29 for b -> error: no free address left…
			alpha: unpool P29 -> ok
			beta: unpool P29 -> ok`,
		"IPv6": `
			alpha: pool local fd44::/64 space=blue reserve.web=10.44.0.9,fd44::9 -> P6
			beta: pool local fd44::/64 space=blue -> P6
			alpha: addr P6 for db -> fd44::1/64
			beta: knows db fd44::1 alpha, web fd44::9 -
			alpha: free P6 fd44::1 -> ok
			beta: addr P6 for db -> fd44::1/64
			beta: addr P6 for web -> fd44::9/64
			alpha: unpool P6 -> ok
			beta: unpool P6 -> ok`,
		"for a time, or not at all": `
			alpha: pool local 10.44.0.0/16 space=blue keep=0 -> BLUE
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: addr BLUE for db -> 10.44.0.1/16
			beta: free BLUE 10.44.0.1 -> ok
			beta: knows 
			beta: unpool BLUE -> ok
			alpha: unpool BLUE -> ok
			alpha: pool local 10.44.0.0/16 space=blue keep=200ms -> BLUE
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: addr BLUE for db -> 10.44.0.1/16
			alpha: free BLUE 10.44.0.1 -> ok
			beta: knows 
			alpha: knows 
			alpha: unpool BLUE -> ok
			beta: unpool BLUE -> ok`,
		"rest after use": `
			alpha: pool local 10.44.0.0/16 space=blue -> BLUE
			beta: pool local 10.44.0.0/16 space=blue -> BLUE
			alpha: addr BLUE -> 10.44.0.1/16
			beta: sees 1
			alpha: free BLUE 10.44.0.1 -> ok
			beta: sees 0
			beta: addr BLUE -> 10.44.0.2/16
			alpha: addr BLUE 10.44.0.1 -> 10.44.0.1/16
			alpha: unpool BLUE -> ok
			beta: unpool BLUE -> ok`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, all := newHosts(t, 3)
			for line := range strings.SplitSeq(script, "\n") {
				who, rest, _ := strings.Cut(strings.TrimSpace(line), ": ")
				at := slices.IndexFunc(all, func(h *house) bool { return h.name == who })
				if names, ok := strings.CutPrefix(rest, "knows"); ok {
					all[at].knowsNames(strings.TrimSpace(names))
				} else if n, ok := strings.CutPrefix(rest, "sees "); ok {
					soon(t, line, func() bool { return n == all[at].usedByAll() })
				} else if rest != "" {
					expect(t, all, strings.NewReplacer("P29", "space=blue,10.44.0.0/29", "P6", "space=blue,fd44::/64").Replace(line))
				}
			}
			nothingLeft(t, all)
		})
	}
}

// TestSharedStranded: what no endpoint of this host has is listed, and freed.
func TestSharedStranded(t *testing.T) {
	_, all := newHosts(t, 2)
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 space=blue -> BLUE
		beta: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: addr BLUE -> 10.44.0.1/16
		alpha: addr BLUE for db -> 10.44.0.2/16
		beta: addr BLUE -> 10.44.0.3/16`)
	alpha := all[0]
	alpha.restart()
	all[1].knowsNames("db 10.44.0.2 alpha")
	expect(t, all, `alpha: addr BLUE -> 10.44.0.4/16`)
	alpha.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string { return map[string]string{"10.44.0.1": "endpoint e1"}[a.String()] }, true
	}
	if s := alpha.Status(t.Context()).Pools[0].Stranded; s != nil {
		t.Errorf("too early: %v", s)
	}
	alpha.stop() // it reads the clock
	alpha.stop = func() {}
	alpha.now = func() time.Time { return time.Now().Add(strandedAfter + time.Minute) }
	if s := fmt.Sprint(alpha.Status(t.Context()).Pools[0].Stranded); s != "[10.44.0.2 10.44.0.4]" {
		t.Errorf("stranded: %s", s)
	}
	expect(t, all, `
		alpha: release blue 10.44.0.1 -> error: …is that of endpoint e1…
		alpha: release blue 10.44.0.2 -> address 10.44.0.2 of pool 10.44.0.0/16 is free
		beta: addr BLUE for db -> 10.44.0.2/16`)
}

// TestSharedNameLate: a host that has not heard yet that a name was released asks.
func TestSharedNameLate(t *testing.T) {
	_, all := newHosts(t, 2)
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 space=blue -> BLUE
		beta: pool local 10.44.0.0/16 space=blue reserve.web=10.44.0.9 -> error: …host alpha has it with no options…
		beta: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: addr BLUE for db -> 10.44.0.1/16
		alpha: reserve blue 10.44.0.9 web -> address 10.44.0.9…
		alpha: addr BLUE for web -> 10.44.0.9/16`)
	all[1].knowsNames("db 10.44.0.1 alpha, web 10.44.0.9 alpha")
	all[1].stop() // it hears of nothing any more
	all[1].stop = func() {}
	expect(t, all, `
		alpha: free BLUE 10.44.0.1 -> ok
		alpha: free BLUE 10.44.0.9 -> ok
		beta: addr BLUE for db -> 10.44.0.1/16
		beta: addr BLUE for web -> 10.44.0.9/16
		alpha: addr BLUE for db -> 10.44.0.2/16
		alpha: addr BLUE for web -> 10.44.0.3/16
		beta: free BLUE 10.44.0.1 -> ok`)
}

// TestSharedReserveCut: the host dies after it wrote that an address is reserved,
// before it has taken it from the name that keeps it.
func TestSharedReserveCut(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	s := &shaky{cluster: openEtcd(t, c.Endpoints, ""), at: -1}
	all := []*house{newHost(t, "alpha", s), newHost(t, "beta", openEtcd(t, c.Endpoints, ""))}
	alpha := all[0]
	expect(t, all, `
		alpha: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: addr BLUE for db -> 10.44.0.1/16
		alpha: free BLUE 10.44.0.1 -> ok`)
	s.mu.Lock()
	s.mode, s.at = "crash before", s.n.Load()+1 // the write after that of the table
	s.mu.Unlock()
	alpha.do("reserve blue 10.44.0.1 web")
	soon(t, "the host is dead", s.died)
	s.calm()
	alpha.restart()
	expect(t, all, `
		alpha: addr BLUE for db -> 10.44.0.2/16
		alpha: addr BLUE -> 10.44.0.3/16
		alpha: addr BLUE for web -> 10.44.0.1/16
		beta: pool local 10.44.0.0/16 space=blue -> BLUE
		alpha: free BLUE 10.44.0.1 -> ok
		beta: addr BLUE for web -> 10.44.0.1/16
		alpha: unpool BLUE -> ok
		beta: unpool BLUE -> ok`)
	nothingLeft(t, all)
}

// nothingLeft: in etcd and on the disks of the hosts.
func nothingLeft(t *testing.T, all []*house) {
	t.Helper()
	if left := inEtcd(t, all[0].shared); len(left) > 0 {
		t.Errorf("left in etcd: %v", left)
	}
	for _, h := range all {
		if left, err := h.left(); err != nil || len(left) > 0 {
			t.Errorf("left on %s: %v, %v", h.name, left, err)
		}
	}
}
