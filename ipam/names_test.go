package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"pgregory.net/rapid"

	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/internal/plugin"
)

// newClock returns a house whose time stands still.
func newClock(tb testing.TB) *house {
	tb.Helper()
	h := newHouse(tb)
	h.clock = time.Unix(1_800_000_000, 0)
	h.now = func() time.Time { return h.clock }
	return h
}

// pooled makes a pool with options as the engine does, and returns its ID.
func (h *house) pooled(prefix string, options map[string]string) (string, error) {
	resp, err := h.RequestPool(h.tb.Context(), ipam.RequestPoolRequest{AddressSpace: LocalSpace, Pool: prefix, Options: options})
	return resp.PoolID, err
}

// addressFor asks for an address of a container as engine 29 does.
func (h *house) addressFor(id, name, want string) string {
	h.tb.Helper()
	resp, err := h.RequestAddress(h.tb.Context(), ipam.RequestAddressRequest{
		PoolID: id, Address: want, Options: map[string]string{plugin.OptionEndpointName: name},
	})
	if err != nil {
		return "error: " + err.Error()
	}
	return resp.Address
}

func TestPoolOptions(t *testing.T) {
	h := newHouse(t)
	for _, c := range []struct{ prefix, key, value, want string }{
		{"10.0.0.0/24", "reserve.web", "10.0.1.5", "is not a usable address of subnet 10.0.0.0/24: 10.0.0.1 to 10.0.0.254 are"},
		{"10.0.0.0/24", "reserve.web", "10.0.0.255", "is not a usable address"},
		{"10.0.0.0/24", "reserve.web", "02:00:00:00:00:01", "no address: write it as 192.168.1.20"},
		{"10.0.0.0/24", "reserve.web", "10.0.0.5,01:00:5e:00:00:01", "is not the MAC address of one interface"},
		{"10.0.0.0/24", "reserve.web", "10.0.0.5,10.0.0.6", "two addresses of subnet"},
		{"10.0.0.0/24", "reserve.web", "here", `"here" is neither an address nor a MAC address`},
		{"10.0.0.0/24", "reserve.", "10.0.0.5", `"" is not the name of a container`},
		{"", "reserve.web", "10.0.0.5", "give the subnet that the address is of with --subnet"},
		{"10.0.0.0/24", "quarantine", "60", "a time is written as 90s, 5m or 24h"},
		{"10.0.0.0/24", "keep", "-1s", "a time is written as"},
		{"10.0.0.0/24", "quarantin", "60s", `did you mean "quarantine"?`},
		{"10.0.0.0/24", "reserv.db", "10.0.0.5", `did you mean "reserve.NAME"?`},
		{"10.0.0.0/24", "reserve", "10.0.0.5", `did you mean "reserve.NAME"?`},
	} {
		_, err := h.pooled(c.prefix, map[string]string{c.key: c.value})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.key) {
			t.Errorf("%s=%s: %v, want %q", c.key, c.value, err, c.want)
		}
	}
	_, err := h.pooled("10.0.0.0/24", map[string]string{"reserve.a": "10.0.0.5", "reserve.b": "10.0.0.5"})
	if err == nil || !strings.Contains(err.Error(), "10.0.0.5 is reserved for a already") {
		t.Error(err)
	}
	if _, err = h.pooled("10.0.0.0/24", map[string]string{"space": "blue", "dhcp": "eth0"}); err == nil || !strings.Contains(err.Error(), "it is the server that hands out addresses, to all hosts: leave space out") {
		t.Error(err)
	}
	// The engine sends both pools of a network the same options.
	both := map[string]string{"reserve.web": "fd00::5, 10.0.0.5,02:00:00:00:00:05"}
	for _, prefix := range []string{"10.0.0.0/24", "fd00::/64"} {
		id, err := h.pooled(prefix, both)
		if err != nil {
			t.Fatal(err)
		}
		if got := h.addressFor(id, "web", ""); !strings.Contains(got, "5/") {
			t.Errorf("in %s: %s", prefix, got)
		}
	}
	if mac, ok := h.Station(netip.MustParsePrefix("fd00::/64"), netip.MustParseAddr("fd00::5")); !ok || mac != (MAC{2, 0, 0, 0, 0, 5}) {
		t.Errorf("its MAC: %v %v", mac, ok)
	}
}

// TestQuarantine: with the option a released address is given out again after that
// time, or when there is no other, the one released first before others.
func TestQuarantine(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/29 quarantine=60s") // 1 to 6
	for range 6 {
		h.do("addr " + id)
	}
	for _, a := range []string{"3", "1", "5"} {
		h.do("free " + id + " 10.1.0." + a)
		h.clock = h.clock.Add(20 * time.Second)
	}
	for _, want := range []string{"10.1.0.3/29", "10.1.0.1/29"} { // the first has rested by now
		if got := h.do("addr " + id); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if got := h.do("addr " + id + " 10.1.0.5"); got != "10.1.0.5/29" {
		t.Errorf("asked for by hand, it rests no longer: %s", got)
	}
	if got := h.do("addr " + id); !strings.Contains(got, "no free address left in pool 10.1.0.0/29: 6 of 6") {
		t.Error(got)
	}
	if s := h.Status(t.Context()).Pools[0]; s.Resting != 0 || s.Used != 6 {
		t.Errorf("%+v", s)
	}
}

// TestKeep: how long a name keeps its address.
func TestKeep(t *testing.T) {
	h := newClock(t)
	for keep, want := range map[string]string{"": "10.1.0.2/24", "1h": "10.1.0.1/24", "0": "10.1.0.1/24"} {
		options := map[string]string{"keep": keep}
		if keep == "" {
			options = nil
		}
		id, err := h.pooled("10.1.0.0/24", options)
		if err != nil {
			t.Fatal(err)
		}
		h.addressFor(id, "web", "")
		h.do("free " + id + " 10.1.0.1")
		h.clock = h.clock.Add(2 * time.Hour)
		if got := h.addressFor(id, "other", ""); got != want {
			t.Errorf("keep=%s, after two hours another has %s, want %s", keep, got, want)
		}
		h.do("unpool " + id)
		if left, err := h.bolt.List(t.Context(), "ipam/"); err != nil || len(left) > 0 {
			t.Fatalf("left: %v %v", left, err)
		}
	}
}

// TestManyNames: names without a container are forgotten, the oldest first.
func TestManyNames(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.0.0.0/8")
	for n := range mostKept + 10 {
		a := h.addressFor(id, fmt.Sprint("n", n), "")
		h.clock = h.clock.Add(time.Second)
		h.do("free " + id + " " + strings.TrimSuffix(a, "/8"))
	}
	names := h.Status(t.Context()).Pools[0].Names
	if len(names) != mostKept || slices.ContainsFunc(names, func(n NameStatus) bool { return n.Name == "n9" }) {
		t.Errorf("%d names", len(names))
	}
	h.restart()
	if n := len(h.Status(t.Context()).Pools[0].Names); n != mostKept {
		t.Errorf("%d names after a restart", n)
	}
	p := h.pool(poolKey{LocalSpace, netip.MustParsePrefix("10.0.0.0/8")})
	if len(p.kept) > 2*mostKept+minQueue {
		t.Errorf("a queue of %d", len(p.kept))
	}
}

// TestBoundAndSquatted: what a name keeps is passed over while a station of the
// LAN has it, what is reserved for it is not.
func TestBoundAndSquatted(t *testing.T) {
	h := newHouse(t)
	id, err := h.pooled("10.1.0.0/24", map[string]string{"reserve.db": "10.1.0.20"})
	if err != nil {
		t.Fatal(err)
	}
	h.addressFor(id, "web", "")
	h.do("free " + id + " 10.1.0.1")
	squats := true
	h.vet = func(_ context.Context, _ netip.Prefix, a netip.Addr) error {
		if squats && (a.String() == "10.1.0.1" || a.String() == "10.1.0.20") {
			return fmt.Errorf("02:11:22:33:44:55 has it")
		}
		return nil
	}
	if got := h.addressFor(id, "web", ""); got != "10.1.0.2/24" {
		t.Errorf("%s, want the next one", got)
	}
	if got := h.addressFor(id, "db", ""); !strings.Contains(got, "02:11:22:33:44:55") {
		t.Errorf("%s, want the refusal", got)
	}
	squats = false
	h.do("free " + id + " 10.1.0.2")
	for name, want := range map[string]string{"web": "10.1.0.1/24", "db": "10.1.0.20/24"} {
		if got := h.addressFor(id, name, ""); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// TestOlderEngine: an engine that tells no names is told of once.
func TestOlderEngine(t *testing.T) {
	h := newHouse(t)
	id, err := h.pooled("10.1.0.0/24", map[string]string{"reserve.db": "10.1.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"10.1.0.2/24", "10.1.0.3/24"} {
		if got := h.do("addr " + id); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if got := h.do("addr " + id + " 10.1.0.1"); got != "10.1.0.1/24" {
		t.Error(got)
	}
	n := 0
	for _, e := range h.log.AllEntries() {
		if strings.Contains(e.Message, "does not say which container") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("said %d times", n)
	}
}

// TestStrandedAll: they are freed by one order, or where a container would find
// no address otherwise; not as long as the engine may still give them back.
func TestStrandedAll(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/29") // 1 to 6
	h.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string { return map[string]string{"10.1.0.5": "endpoint e1"}[a.String()] }, true
	}
	h.do("gw " + id)
	for range 5 {
		h.do("addr " + id)
	}
	all := func(want string) {
		t.Helper()
		got, err := h.Carry(t.Context(), Order{Do: "release", Stranded: true})
		if got != want || err != nil {
			t.Errorf("release -stranded: %s %v, want %s", got, err, want)
		}
	}
	h.clock = time.Now().Add(9 * time.Minute)
	full := "error: no free address left in pool 10.1.0.0/29: 6 of 6 are in use: remove a container, or make the network with a larger --subnet"
	if got := h.do("addr " + id); got != full {
		t.Error(got)
	}
	all("no address is stranded: each that was handed out more than ten minutes ago is in use")
	h.restart()
	h.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string { return map[string]string{"10.1.0.5": "endpoint e1"}[a.String()] }, true
	}
	h.clock = h.clock.Add(9 * time.Minute)
	if got := h.do("addr " + id); got != full {
		t.Errorf("nine minutes after a start: %s", got)
	}
	h.hold("10.1.0.0/29", swarmID)
	h.clock = h.clock.Add(2 * time.Minute)
	if got := h.do("addr " + id); got != full {
		t.Errorf("of a swarm's: %s", got)
	}
	h.hold("10.1.0.0/29", localID)
	if got := h.do("addr " + id); got != "10.1.0.2/29" {
		t.Errorf("rather than none: %s", got)
	}
	h.clock = h.clock.Add(time.Minute)
	if got, err := h.Carry(t.Context(), Order{Do: "release", Stranded: true, Pool: netip.MustParsePrefix("10.9.0.0/29")}); err != nil || !strings.HasPrefix(got, "no address") {
		t.Error(got, err)
	}
	h.clock = time.Now().Add(strandedAfter + 2*time.Minute)
	h.started = h.clock.Add(-time.Hour)
	all("free again: 10.1.0.2 10.1.0.3 10.1.0.4 10.1.0.6")
}

// TestElsewhere: what a container of another host has is passed over, also by a
// name that had it, and not reserved.
func TestElsewhere(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/24")
	far := map[string]string{}
	h.far = func(netip.Prefix) func(netip.Addr) (string, bool) {
		return func(a netip.Addr) (string, bool) { host, ok := far[a.String()]; return host, ok }
	}
	for n := 1; n <= 100; n++ {
		if n != 7 {
			far[fmt.Sprint("10.1.0.", n)] = "beta"
		}
	}
	for _, want := range []string{"10.1.0.7/24", "10.1.0.101/24"} {
		if got := h.do("addr " + id); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if got := h.addressFor(id, "web", ""); got != "10.1.0.102/24" {
		t.Error(got)
	}
	h.do("free " + id + " 10.1.0.102")
	h.do("free " + id + " 10.1.0.101")
	far["10.1.0.102"], far["10.1.0.101"] = "beta", "beta"
	if got := h.addressFor(id, "web", ""); got != "10.1.0.103/24" {
		t.Errorf("of what web had, which is elsewhere: %s", got)
	}
	if got := h.do("addr " + id); got != "10.1.0.104/24" {
		t.Errorf("just given back, and elsewhere: %s", got)
	}
	h.do("free " + id + " 10.1.0.7")
	h.do("free " + id + " 10.1.0.104")
	far["10.1.0.7"] = "beta"
	h.do("addr " + id + " 10.1.0.101")
	delete(far, "10.1.0.8")
	if got := h.do("addr " + id); got != "10.1.0.104/24" {
		t.Errorf("the lowest of two given back is elsewhere: %s", got)
	}
	_, err := h.Carry(t.Context(), Order{Do: "reserve", Address: netip.MustParseAddr("10.1.0.9"), Name: "db"})
	if err == nil || err.Error() != "address 10.1.0.9 of pool 10.1.0.0/24 is held by host beta: choose another, or remove that container first" {
		t.Error(err)
	}
}

// TestFullElsewhere: who finds a pool full is told how many of its addresses other
// hosts have.
func TestFullElsewhere(t *testing.T) {
	h := newClock(t)
	h.far = func(netip.Prefix) func(netip.Addr) (string, bool) {
		return func(a netip.Addr) (string, bool) { return "beta", a.As4()[3] != 3 && a.As4()[3] != 9 }
	}
	for pool, want := range map[string]string{
		"10.1.0.0/29":                 "1 of 6 are in use, and 5 on other hosts: remove a container",
		"10.2.0.0/28 sub 10.2.0.8/29": "no free address left in 10.2.0.8/29 of pool 10.2.0.0/28: all 7 are in use, 6 of them on other hosts: remove a container",
	} {
		id := h.do("pool local " + pool)
		if got := h.do("addr " + id); strings.HasPrefix(got, "error") {
			t.Errorf("%s: %s", pool, got)
		}
		if got := h.do("addr " + id); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", pool, got, want)
		}
	}
}

// TestReserveHeld: who has an address that is to be reserved is said.
func TestReserveHeld(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/24")
	h.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string {
			return map[string]string{"10.1.0.1": "the gateway", "10.1.0.2": "endpoint e1", "10.1.0.3": "auxiliary address nas"}[a.String()]
		}, true
	}
	h.do("gw " + id)
	for _, a := range []string{"2", "3", "4"} {
		h.do("addr " + id + " 10.1.0." + a)
	}
	h.addressFor(id, "web", "10.1.0.5")
	for a, want := range map[string]string{
		"10.1.0.1": "is the gateway of its network: choose another",
		"10.1.0.2": "is reserved for db; endpoint e1 has it now: if that is another container, remove it (docker network inspect shows which it is)",
		"10.1.0.3": "is auxiliary address nas of its network: choose another",
		"10.1.0.4": "is reserved for db; a container has it now",
		"10.1.0.5": "is in use by web: remove that container first",
		"10.1.0.6": "is reserved for db<nil>",
	} {
		got, err := h.Carry(t.Context(), Order{Do: "reserve", Address: netip.MustParseAddr(a), Name: "db"})
		if text := fmt.Sprint(got, err); !strings.Contains(text, want) {
			t.Errorf("%s: %s, want %s", a, text, want)
		}
	}
}

// TestStranded: what was given out ten minutes ago and no endpoint has.
func TestStranded(t *testing.T) {
	h := newHouse(t)
	id := h.do("pool local 10.1.0.0/28")
	h.do("gw " + id)
	h.do("addr " + id)
	h.do("addr " + id)
	free := h.do("pool local 10.2.0.0/24")
	h.do("addr " + free)
	h.used = func(p netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string { return map[string]string{"10.1.0.2": "endpoint e1"}[a.String()] }, p.Addr().String() == "10.1.0.0"
	}
	if s := h.Status(t.Context()).Pools; s[0].Stranded != nil || s[1].Stranded != nil {
		t.Errorf("too early: %+v", s)
	}
	h.now = func() time.Time { return time.Now().Add(strandedAfter + time.Minute) }
	if s := h.Status(t.Context()).Pools; len(s[0].Stranded) != 1 || s[0].Stranded[0].String() != "10.1.0.3" || s[1].Stranded != nil {
		t.Errorf("%+v", s)
	}
	carry := func(force bool, address, part string) {
		t.Helper()
		got, err := h.Carry(t.Context(), Order{Do: "release", Address: netip.MustParseAddr(address), Force: force})
		if text := fmt.Sprint(got, err); !strings.Contains(text, part) {
			t.Errorf("release %s: %s, want %q", address, text, part)
		}
	}
	carry(true, "10.1.0.2", "is that of endpoint e1: disconnect its container")
	carry(false, "10.1.0.3", "is free")
	carry(false, "10.1.0.3", "is not taken")
	carry(false, "10.2.0.1", "another driver's network")
	carry(true, "10.2.0.1", "is free")
	carry(true, "10.3.0.1", "in no pool")
	for range 11 {
		h.do("addr " + id)
	}
	if w := h.Status(t.Context()).Pools[0].Warning; !strings.Contains(w, "13 of 14 addresses are in use") {
		t.Error(w)
	}
}

// TestCrashes ends the process between any two writes of random calls. What the
// engine was told it has stays its own and is nobody else's, and nothing but
// what was in flight is left over in the end.
func TestCrashes(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		h := newHouse(t)
		var f *faulty
		h.wrap = func(x records) records {
			f = &faulty{records: x, at: -1, mode: "crash before"}
			return f
		}
		h.restart()
		id, err := h.pooled("10.1.0.0/29", map[string]string{"reserve.r": "10.1.0.5"})
		if err != nil {
			r.Fatal(err)
		}
		h.hold("10.1.0.0/29", localID)
		live := map[string]string{} // what the engine has, and for whom
		name := rapid.SampledFrom([]string{"", "a", "b", "r"})
		// doing lets the process die at some write of a call, or not at all.
		doing := func(r *rapid.T, do func() string) (answer string, died bool) {
			f.mu.Lock()
			f.mode = rapid.SampledFrom([]string{"crash before", "crash after"}).Draw(r, "mode")
			f.n, f.at = 0, rapid.IntRange(-3, 3).Draw(r, "write")
			f.mu.Unlock()
			answer = do()
			if died = f.dead; died {
				h.restart()
			}
			f.at = -1
			return answer, died
		}
		r.Repeat(map[string]func(*rapid.T){
			"request": func(r *rapid.T) {
				who := name.Draw(r, "name")
				want := rapid.SampledFrom([]string{"", "", "10.1.0.2", "10.1.0.5"}).Draw(r, "want")
				got, died := doing(r, func() string { return h.addressFor(id, who, want) })
				if strings.HasPrefix(got, "error") {
					if !died && want == "" && len(live) < 4 && !strings.Contains(got, "no free address") {
						r.Fatal(got)
					}
					return
				}
				a, err := netip.ParsePrefix(got)
				if err != nil || a.Bits() != 29 || !netip.MustParsePrefix("10.1.0.0/29").Contains(a.Addr()) {
					r.Fatalf("%s is not of the pool", got)
				}
				if have, ok := live[a.Addr().String()]; ok {
					r.Fatalf("%s for %q, and %q has it", got, who, have)
				}
				if got == "10.1.0.5/29" && who != "r" && who != "" {
					r.Fatalf("%s for %q", got, who)
				}
				live[a.Addr().String()] = who
			},
			"release": func(r *rapid.T) {
				if len(live) == 0 {
					return
				}
				var have []string
				for a := range live {
					have = append(have, a)
				}
				slices.Sort(have)
				a := rapid.SampledFrom(have).Draw(r, "address")
				doing(r, func() string { return h.do("free " + id + " " + a) })
				delete(live, a) // the engine never asks again
			},
			"restart": func(*rapid.T) { h.restart() },
			"": func(r *rapid.T) {
				p := h.pool(poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/29")})
				for a := range live {
					if !p.taken.has(netip.MustParseAddr(a)) {
						r.Fatalf("%s is lost", a)
					}
				}
			},
		})
		h.do("unpool " + id)
		if left, err := h.left(); err != nil || len(left) > 0 {
			r.Fatalf("left: %v %v", left, err)
		}
		if err := h.bolt.Close(); err != nil {
			r.Fatal(err)
		}
	})
}

// TestVoidName: a name whose record could not be deleted when another got its
// address has none after a restart.
func TestVoidName(t *testing.T) {
	h := newClock(t)
	var f *faulty
	h.wrap = func(r records) records {
		f = &faulty{records: r, at: -1, mode: "fail"}
		return f
	}
	h.restart()
	id := h.do("pool local 10.1.0.0/30") // .1 and .2
	h.addressFor(id, "web", "")
	h.do("free " + id + " 10.1.0.1")
	h.addressFor(id, "db", "")
	f.n, f.at = 0, 0 // the record of web
	if got := h.addressFor(id, "zoe", ""); got != "10.1.0.1/30" {
		t.Fatal(got)
	}
	f.at = -1
	key := poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/30")}.name("web")
	if left, err := h.bolt.List(t.Context(), key); err != nil || len(left) != 1 {
		t.Fatalf("the record of web: %v %v", left, err)
	}
	h.restart()
	if left, err := h.bolt.List(t.Context(), key); err != nil || len(left) > 0 {
		t.Errorf("the record of web after a restart: %v %v", left, err)
	}
	h.do("free " + id + " 10.1.0.1")
	if got := h.addressFor(id, "zoe", ""); got != "10.1.0.1/30" {
		t.Errorf("zoe: %s", got)
	}
	if got := h.addressFor(id, "web", ""); !strings.Contains(got, "no free address left") {
		t.Errorf("web: %s", got)
	}
}

// TestForgottenAndBoundAgain: the record of a name that is deleted late is written
// again if the name has an address by then.
func TestForgottenAndBoundAgain(t *testing.T) {
	h := newClock(t)
	id := h.do("pool local 10.1.0.0/24")
	p := h.pool(poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/24")})
	h.addressFor(id, "web", "")
	h.forgetNames(t.Context(), p, []binding{{name: "web"}})
	h.restart()
	if s := h.Status(t.Context()).Pools[0].Names; len(s) != 1 || s[0].Address.String() != "10.1.0.1" {
		t.Errorf("%+v", s)
	}
}

// FuzzOptions: what is accepted is read again from its record as the same, and what
// is reserved is an address of the pool.
func FuzzOptions(f *testing.F) {
	for _, s := range [][5]string{
		{"reserve.web", "10.0.0.5", "keep", "24h", "10.0.0.0/24"}, {"reserve.web", "fd00::5, 10.0.0.5,02:00:00:00:00:05", "quarantine", "0", "fd00::/64"},
		{"reserve.a", "10.0.0.5", "reserve.b", "10.0.0.5", "10.0.0.0/24"}, {"dhcp", "eth0.7", "reserve.x", "10.0.0.255", "10.0.0.0/24"},
		{"space", "blue", "", "", "10.0.0.0/24"}, {"reserve.w", "10.0.0.5,02-00-00-00-00-05,", "keep", "1h1m", ""}, {"reserve.w", "fe80::1%eth0", "dhcp", "a:1", "fe80::/64"},
		{"client_id.web", "01:02:42", "dhcp", "a", ""}, {"hostname", "none", "dhcp", "a", "10.0.0.0/24"}, {"dhcp_fallback", "10.0.0.16/28, fd00::/120", "dhcp", "a", "10.0.0.0/24"}, {"client_id.a.b", "0x0g", "dhcp", "a", ""},
		{"vendor_class", "x y", "dhcp", "a", ""}, {"register_dns.w", "true", "dhcp_timeout", "1500ms", ""},
		{"reserve./x", "::ffff:10.0.0.5", "keep", "-1ns", "::/0"}, {"reserve.w", "0200.0000.0005,10.0.0.0", "quarantine", "9999999h", "10.0.0.0/31"},
	} {
		f.Add(s[0], s[1], s[2], s[3], s[4])
	}
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2, pool string) {
		prefix, err := netip.ParsePrefix(pool)
		if err != nil || validPool(prefix) != nil {
			prefix = netip.Prefix{}
		}
		o, err := parseOptions(map[string]string{k1: v1, k2: v2}, prefix)
		if err != nil {
			return
		}
		again, err := parseOptions(o.raw, prefix)
		if err != nil {
			t.Fatalf("%q is refused when it is read again: %v", o.raw, err)
		}
		again.space = o.space // which is not in the record
		if !reflect.DeepEqual(o, again) {
			t.Fatalf("%q is read again as %+v, first it was %+v", o.raw, again, o)
		}
		if o.quarantine < 0 && o.quarantine != restsFar || o.dhcp != "" && checkLink(o.dhcp) != nil {
			t.Fatalf("%+v", o)
		}
		for name, told := range o.told {
			s := dhcp.Station{MAC: MAC{2}, DUID: []byte("host")}
			o.tellingOf(name).apply(&s, name)
			if len(s.ClientID) == 1 || len(s.ClientID) > 255 || len(s.Vendor) > 255 || o.dhcp == "" || told.timeout < 0 || told.timeout > mostPatience {
				t.Fatalf("%q: %+v is told of %+v", o.raw, told, s)
			}
		}
		for name, r := range o.reserved {
			if first, last := (poolKey{prefix: prefix}).usable(); r.addr.Less(first) || last.Less(r.addr) || !prefix.Contains(r.addr) {
				t.Fatalf("%s is reserved in %s", r, prefix)
			}
			if same, err := parseReservation(name, r.String(), prefix); err != nil || same != r {
				t.Fatalf("%s is read again as %s, %v", r, same, err)
			}
		}
	})
}

// TestReservedAtOnce: of many who reserve one address one gets it, also after a
// restart.
func TestReservedAtOnce(t *testing.T) {
	h := newHouse(t)
	h.do("pool local 10.1.0.0/24")
	var wg sync.WaitGroup
	done := make([]error, 20)
	for n := range done {
		wg.Go(func() {
			_, done[n] = h.Carry(t.Context(), Order{Do: "reserve", Name: fmt.Sprint("n", n), Address: netip.MustParseAddr("10.1.0.9")})
		})
	}
	wg.Wait()
	for range 2 {
		names := h.Status(t.Context()).Pools[0].Names
		if len(names) != 1 || names[0].Name != fmt.Sprint("n", slices.Index(done, nil)) {
			t.Errorf("%+v, errors %v", names, done)
		}
		h.restart()
	}
}
