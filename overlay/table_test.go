package overlay

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/weftnet/weft/internal/datapath"
)

const testGrace = 10 * time.Minute

var ips = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})

// clock is a host's, which is put forward and back.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newClock() *clock { return &clock{time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)} }

func tableAt(id string, c *clock) *Table {
	t := NewTable(id, testGrace)
	t.now = c.now
	return t
}

func vtep(host int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(host + 1)}) }

func mac(n int) datapath.MAC { return datapath.MAC{2, 0, 0, 0, byte(n >> 8), byte(n)} }

func addr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }

// part is a part as the driver would set it.
func part(host int, vni uint32, endpoints ...Endpoint) Part {
	return Part{
		Host: id(host), Name: fmt.Sprintf("host-%d", host), VNI: vni, VTEP: vtep(host), Port: 4789, MTU: 1450,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}, Endpoints: endpoints,
	}
}

func id(host int) string { return fmt.Sprintf("%c", 'a'+host) }

// world is some hosts and all that was ever said.
type world struct {
	tables []*Table
	clocks []*clock
	truth  []map[uint32]Part // what was last set
	said   []Known
}

func (w *world) set(host int, p Part) {
	w.truth[host][p.VNI] = p
	w.tables[host].Set(p)
	w.said = append(w.said, w.tables[host].Known()...)
}

// settle lets everyone tell everyone everything, in any order.
func (w *world) settle(t *rapid.T) {
	type pair struct{ from, to int }
	var pairs []pair
	for i, table := range w.tables {
		for j := range w.tables {
			if i != j {
				table.Heard(id(j), fmt.Sprintf("host-%d", j))
				pairs = append(pairs, pair{i, j})
			}
		}
	}
	for range 4 { // a part, that its host has forgotten it, that it is gone, and that to all
		for _, p := range rapid.Permutation(pairs).Draw(t, "order") {
			known := w.tables[p.from].Known()
			if rapid.Bool().Draw(t, "backwards") {
				slices.Reverse(known)
			}
			for _, k := range known {
				if _, err := w.tables[p.to].Merge(k.Part, k.Silent); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// model is what a host should see, worked out the plain way.
func (w *world) model(self int, vni uint32) View {
	v := View{Forwards: map[datapath.MAC]netip.Addr{}, Neighbours: map[netip.Addr]datapath.MAC{}}
	if p, ok := w.truth[self][vni]; !ok || p.Gone {
		return v
	}
	type entry struct {
		host int
		e    Endpoint
	}
	var all []entry
	for i := range w.tables {
		p, ok := w.truth[i][vni]
		if !ok || p.Gone {
			continue
		}
		if i != self {
			v.VTEPs = append(v.VTEPs, p.VTEP)
		}
		for _, e := range p.Endpoints {
			all = append(all, entry{i, e})
		}
	}
	slices.SortFunc(all, func(a, b entry) int {
		if a.e.Claim != b.e.Claim {
			return int(int64(a.e.Claim) - int64(b.e.Claim))
		}
		return a.host - b.host
	})
	macs, addrs := map[datapath.MAC]entry{}, map[netip.Addr]entry{}
	for _, e := range all { // the later one replaces
		macs[e.e.MAC] = e
		for _, a := range e.e.Addrs {
			addrs[a] = e
		}
	}
	for m, e := range macs {
		if e.host != self {
			v.Forwards[m] = vtep(e.host)
		}
	}
	for a, e := range addrs {
		if e.host != self {
			v.Neighbours[a] = e.e.MAC
		}
	}
	slices.SortFunc(v.VTEPs, netip.Addr.Compare)
	return v
}

// TestTableConverges: whatever was lost, said twice, came late or was forgotten,
// once all have talked to all they see what was last set.
func TestTableConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const networks = 2
		n := rapid.IntRange(2, 4).Draw(t, "hosts")
		w := &world{}
		for i := range n {
			c := newClock()
			c.t = c.t.Add(time.Duration(rapid.IntRange(-600, 600).Draw(t, "skew")) * time.Second)
			w.clocks = append(w.clocks, c)
			w.tables = append(w.tables, tableAt(id(i), c))
			w.truth = append(w.truth, map[uint32]Part{})
		}
		host := rapid.IntRange(0, n-1)
		vni := rapid.Uint32Range(1, networks)
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				i, v := host.Draw(t, "host"), vni.Draw(t, "vni")
				var list []Endpoint
				for _, m := range rapid.SliceOfNDistinct(rapid.IntRange(0, 5), 0, 3, rapid.ID).Draw(t, "macs") {
					claim := w.tables[i].Claim()
					if rapid.Bool().Draw(t, "tie") {
						claim = 7
					}
					list = append(list, Endpoint{MAC: mac(m), Addrs: []netip.Addr{addr(m + rapid.IntRange(0, 1).Draw(t, "addr"))}, Claim: claim})
				}
				// Two endpoints of one host never claim one address at once.
				list = slices.CompactFunc(list, func(a, b Endpoint) bool { return a.Addrs[0] == b.Addrs[0] })
				if distinct(list) {
					w.set(i, part(i, v, list...))
				}
			},
			"gone": func(t *rapid.T) {
				i, v := host.Draw(t, "host"), vni.Draw(t, "vni")
				w.set(i, Part{Name: fmt.Sprintf("host-%d", i), VNI: v, Gone: true})
			},
			"say": func(t *rapid.T) { // anything that was ever said, to anyone
				if len(w.said) > 0 {
					k := rapid.SampledFrom(w.said).Draw(t, "part")
					_, _ = w.tables[host.Draw(t, "host")].Merge(k.Part, time.Duration(rapid.IntRange(0, 900).Draw(t, "silent"))*time.Second)
				}
			},
			"tell": func(t *rapid.T) { // what one knows of all, to another
				for _, k := range w.tables[host.Draw(t, "from")].Known() {
					_, _ = w.tables[host.Draw(t, "to")].Merge(k.Part, k.Silent)
				}
			},
			"forget": func(t *rapid.T) { // state is lost
				i := host.Draw(t, "host")
				w.tables[i], w.truth[i] = tableAt(id(i), w.clocks[i]), map[uint32]Part{}
			},
			"silent": func(t *rapid.T) { w.tables[host.Draw(t, "host")].Silent(id(host.Draw(t, "other"))) },
			"heard": func(t *rapid.T) {
				j := host.Draw(t, "other")
				w.tables[host.Draw(t, "host")].Heard(id(j), fmt.Sprintf("host-%d", j))
			},
			"clock": func(t *rapid.T) {
				c := w.clocks[host.Draw(t, "host")]
				c.t = c.t.Add(time.Duration(rapid.IntRange(-60, 60).Draw(t, "jump")) * time.Second)
			},
			"expire": func(t *rapid.T) { w.tables[host.Draw(t, "host")].Expire() },
			"": func(t *rapid.T) {
				for i, table := range w.tables {
					for v := range uint32(networks + 1) {
						for _, to := range table.View(v).Forwards {
							if to == vtep(i) {
								t.Fatalf("host %s forwards to itself", id(i))
							}
						}
					}
				}
			},
		})
		w.settle(t)
		for i, table := range w.tables {
			for v := uint32(1); v <= networks; v++ {
				got := table.View(v)
				got.Conflicts = nil
				if diff := cmp.Diff(w.model(i, v), got, ips); diff != "" {
					t.Fatalf("host %s, VNI %d: want -, got +\n%s", id(i), v, diff)
				}
			}
		}
	})
}

func distinct(list []Endpoint) bool {
	seen := map[netip.Addr]bool{}
	for _, e := range list {
		seen[e.Addrs[0]] = true
	}
	return len(seen) == len(list)
}

// merge fails the test where a part is refused.
func merge(t *testing.T, table *Table, p Part, silent time.Duration) bool {
	t.Helper()
	fresh, err := table.Merge(p, silent)
	if err != nil {
		t.Fatal(err)
	}
	return fresh
}

func (c *clock) pass(d time.Duration) { c.t = c.t.Add(d) }

// later is a part with a version.
func later(p Part, version uint64) Part { p.Version = version; return p }

func TestTableSilentHostStaysForGrace(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	table.Set(part(0, 1))
	table.Heard("b", "host-1")
	merge(t, table, later(part(1, 1, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}, Claim: 5}), 1), 0)
	table.Dirty()

	table.Silent("b")
	c.pass(testGrace - 1)
	if got := table.Expire(); got != nil {
		t.Fatalf("forgot %v before the grace time", got)
	}
	if got := table.View(1); got.Forwards[mac(1)] != vtep(1) || len(got.VTEPs) != 1 {
		t.Fatalf("a silent host lost its way: %v", got)
	}
	if diff := cmp.Diff([]uint32{1}, table.Dirty()); diff != "" {
		t.Fatal(diff) // conflicts depend on who is silent
	}
	// Whoever claims later has it at once, and nobody is told of a conflict.
	table.Heard("c", "host-2")
	merge(t, table, later(part(2, 1, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}, Claim: 6}), 1), 0)
	got := table.View(1)
	if got.Forwards[mac(1)] != vtep(2) || len(got.Conflicts) != 0 {
		t.Fatalf("the later claim does not have it: %v", got)
	}
	table.Dirty()
	c.pass(1)
	if diff := cmp.Diff([]string{"host-1"}, table.Expire()); diff != "" {
		t.Fatal(diff)
	}
	if diff := cmp.Diff([]uint32{1}, table.Dirty()); diff != "" {
		t.Fatal(diff)
	}
	if got := table.View(1); !slices.Equal(got.VTEPs, []netip.Addr{vtep(2)}) {
		t.Fatalf("a forgotten host is still there: %v", got.VTEPs)
	}
	if table.Expire() != nil {
		t.Fatal("forgot a host twice")
	}
}

func TestTableHeardAgainIsNotForgotten(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	table.Set(part(0, 1))
	table.Heard("b", "host-1")
	merge(t, table, later(part(1, 1), 1), 0)
	table.Silent("b")
	c.pass(testGrace - 1)
	table.Heard("b", "host-1")
	c.pass(testGrace)
	if got := table.Expire(); got != nil || len(table.View(1).VTEPs) != 1 {
		t.Fatalf("forgot %v, which is heard", got)
	}
}

// TestTableSilenceOfOthers: what another host says of how long a third was
// silent counts only where it heard it last.
func TestTableSilenceOfOthers(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	table.Set(part(0, 1))
	p := later(part(1, 1), 1)
	if merge(t, table, p, testGrace) {
		t.Fatal("took over a host that was silent for the grace time")
	}
	if table.knows("b") {
		t.Fatal("knows a host that it did not take over")
	}
	merge(t, table, p, testGrace-time.Minute)
	c.pass(30 * time.Second)
	// A little younger is the time on the way, and must not add up.
	merge(t, table, p, testGrace-35*time.Second)
	merge(t, table, p, testGrace-time.Second) // who heard it less long ago is right
	c.pass(30*time.Second - 1)
	if got := table.Expire(); got != nil {
		t.Fatalf("forgot %v too early", got)
	}
	c.pass(1)
	if got := table.Expire(); len(got) != 1 {
		t.Fatal("a host that all believe silent was not forgotten")
	}
	merge(t, table, p, time.Minute)
	table.Heard("b", "host-1")
	table.Silent("b")
	c.pass(5 * time.Minute)
	merge(t, table, p, 0) // the other hears it, and this host does not
	c.pass(testGrace - 1)
	if got := table.Expire(); got != nil {
		t.Fatalf("forgot %v, which another host has heard", got)
	}
}

// TestTableGoneStaysGone: a stale part by way of a third host does not bring a
// network back, neither before nor after its host is forgotten.
func TestTableGoneStaysGone(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	table.Set(part(0, 1))
	table.Heard("b", "host-1")
	stale := later(part(1, 1), 1)
	merge(t, table, stale, 0)
	merge(t, table, Part{Host: "b", Name: "host-1", VNI: 1, Version: 2, Gone: true}, 0)
	empty := func(when string) {
		t.Helper()
		if v := table.View(1); len(v.VTEPs) != 0 || len(table.Holders(1)) != 0 {
			t.Fatalf("%s: the network is back: %v", when, v)
		}
	}
	for _, silent := range []time.Duration{0, time.Minute, 2 * testGrace} {
		merge(t, table, stale, silent)
		empty("heard")
	}
	table.Silent("b")
	merge(t, table, stale, 0)
	empty("silent")
	c.pass(testGrace)
	table.Expire()
	merge(t, table, stale, testGrace)
	empty("forgotten")
}

func TestTableOutdoesWhatItForgot(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	future := uint64(c.t.Add(ahead).UnixNano()) - 5
	old := later(part(0, 1, Endpoint{MAC: mac(9), Claim: future + 5}), future)

	// A network that is still there.
	table.Set(part(0, 1))
	<-table.Mine()
	merge(t, table, old, 0)
	own := table.Own()
	if len(own) != 1 || own[0].Version <= future || own[0].Gone || len(own[0].Endpoints) != 0 {
		t.Fatalf("was not outdone: %+v", own)
	}
	select {
	case <-table.Mine():
	default:
		t.Fatal("nobody sends what outdoes it")
	}
	if got := table.Claim(); got <= future+5 {
		t.Fatalf("claim %d is not later than one seen, %d", got, future+5)
	}
	again := own[0]
	merge(t, table, again, 0) // what was said now is not outdone
	if diff := cmp.Diff(again, table.Own()[0], ips); diff != "" {
		t.Fatal(diff)
	}

	// One that is not there any more.
	merge(t, table, later(part(0, 2), future), 0)
	own = table.Own()
	if len(own) != 2 || own[1].VNI != 2 || !own[1].Gone || own[1].Version <= future {
		t.Fatalf("was not withdrawn: %+v", own)
	}
	// Neither is kept for ever.
	c.pass(testGrace)
	table.Expire()
	if own = table.Own(); len(own) != 1 || own[0].VNI != 1 {
		t.Fatalf("a network that is gone is kept for ever: %+v", own)
	}
}

func TestTableVersionsGrowWhenTheClockIsPutBack(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	last := uint64(0)
	for i := range 10 {
		table.Set(part(0, 1, Endpoint{MAC: mac(i + 1)}))
		c.pass(-ahead / 11)
		table.Expire()
		if v := table.Own()[0].Version; v <= last {
			t.Fatalf("version %d after %d", v, last)
		} else {
			last = v
		}
	}
}

// TestClocksMendedOneByOne: all clocks were a year ahead. Whichever is mended
// first, its host is believed again when the last one is.
func TestClocksMendedOneByOne(t *testing.T) {
	const wrong = 365 * 24 * time.Hour
	var clocks []*clock
	var tables []*Table
	for i := range 3 {
		c := newClock()
		c.pass(wrong)
		clocks, tables = append(clocks, c), append(tables, tableAt(id(i), c))
	}
	talk := func() { // as Gossip does it
		for i, from := range tables {
			for j, to := range tables {
				if i == j {
					continue
				}
				to.Heard(id(i), "")
				own := from.Own()[0]
				if _, err := to.Merge(own, 0); err != nil {
					continue
				}
				if held, _ := to.part(id(i), 1); held.Version > from.Own()[0].Version {
					_, _ = from.Merge(Part{Host: id(i), VNI: 1, Version: held.Version, Gone: true}, 0)
				}
			}
		}
	}
	pass := func(d time.Duration) {
		for ; d > 0; d -= time.Second {
			for i, table := range tables {
				clocks[i].pass(time.Second)
				table.Expire()
			}
			talk()
		}
	}
	for i, table := range tables {
		table.Set(part(i, 1, Endpoint{MAC: mac(i), Addrs: []netip.Addr{addr(i)}, Claim: table.Claim()}))
	}
	pass(3 * time.Second)
	for _, c := range clocks {
		c.pass(-wrong)
		pass(90 * time.Second)
	}
	for i, table := range tables {
		own := table.Own()[0]
		own.Endpoints = append(own.Endpoints, Endpoint{MAC: mac(i + 10), Addrs: []netip.Addr{addr(i + 10)}, Claim: table.Claim()})
		table.Set(own)
	}
	pass(90 * time.Second)
	for i, table := range tables {
		if v := table.Own()[0].Version; v > latest(clocks[i].now()) {
			t.Errorf("host %d says version %d, which all others refuse", i, v)
		}
		for j := range tables {
			if got := table.View(1).Forwards[mac(j+10)]; i != j && got != vtep(j) {
				t.Errorf("host %d sends what is for a new container of host %d to %v", i, j, got)
			}
		}
	}
}

func TestTableKeepsOnlyItsNetworks(t *testing.T) {
	table := tableAt("a", newClock())
	if merge(t, table, later(part(1, 1), 1), 0) || len(table.Known()) != 0 {
		t.Fatal("keeps a part of a network that it does not have")
	}
	table.Set(part(0, 1))
	if !merge(t, table, later(part(1, 1), 1), 0) || merge(t, table, later(part(1, 1), 1), 0) {
		t.Fatal("a part is fresh once")
	}
	table.Set(Part{VNI: 1, Gone: true})
	if len(table.Known()) != 1 || len(table.View(1).VTEPs) != 0 {
		t.Fatal("keeps parts of a network that is gone here")
	}
}

func TestTableTellsOfDisagreement(t *testing.T) {
	table := tableAt("a", newClock())
	own := part(0, 1, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}, Claim: 5})
	table.Set(own)
	for i := 1; i <= 4; i++ {
		table.Heard(id(i), fmt.Sprintf("host-%d", i))
	}
	merge(t, table, later(part(1, 1, Endpoint{MAC: mac(2), Addrs: []netip.Addr{addr(1)}, Claim: 9}), 1), 0)
	p := part(2, 1, Endpoint{MAC: mac(3)})
	p.MTU = 9000
	merge(t, table, later(p, 1), 0)
	p = part(3, 1, Endpoint{MAC: mac(4)})
	p.Subnets = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	merge(t, table, later(p, 1), 0)
	p = part(4, 1, Endpoint{MAC: mac(5)})
	p.Port = 8472
	merge(t, table, later(p, 1), 0)
	want := View{
		VTEPs:      []netip.Addr{vtep(1), vtep(2)},
		Forwards:   map[datapath.MAC]netip.Addr{mac(2): vtep(1), mac(3): vtep(2)},
		Neighbours: map[netip.Addr]datapath.MAC{addr(1): mac(2)},
		Conflicts: []string{
			"10.0.0.1 is claimed by host host-0 and by host host-1; the later claim, that of host-1, has it",
			"host host-2 has VNI 1 with another mtu 9000, and here 1450",
			"host host-3 has VNI 1 with another subnet 10.9.0.0/16, and here 10.0.0.0/16",
			"host host-4 has VNI 1 with another port 8472, and here 4789",
		},
	}
	if diff := cmp.Diff(want, table.View(1), ips); diff != "" {
		t.Fatal(diff)
	}
	if name, ok := table.Holder(1, addr(1)); name != "host-1" || !ok {
		t.Fatalf("holder %q %v", name, ok)
	}
	table.Silent("b")
	if got := table.View(1).Conflicts; slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "claimed") }) {
		t.Fatalf("a silent host contests: %v", got)
	}
	if _, ok := table.Holder(1, addr(1)); ok {
		t.Fatal("a silent host holds an address")
	}
}

func TestTableDoesNotKeepTheCallersSlice(t *testing.T) {
	table := tableAt("a", newClock())
	list := []Endpoint{{MAC: mac(2)}, {MAC: mac(1)}}
	table.Set(part(0, 1, list...))
	if list[0].MAC != mac(2) {
		t.Fatal("Set sorts what it was given")
	}
	list[0].MAC = mac(7)
	if got := table.Own()[0].Endpoints; got[0].MAC != mac(1) || got[1].MAC != mac(2) {
		t.Fatalf("not sorted, or not its own: %v", got)
	}
}

func TestPartCheck(t *testing.T) {
	many := make([]Endpoint, mostEndpoints+1)
	for i := range many {
		many[i].MAC = mac(i + 1)
	}
	bad := map[string]func(*Part){
		"no host":         func(p *Part) { p.Host = "" },
		"long host":       func(p *Part) { p.Host = strings.Repeat("x", 65) },
		"VNI 0":           func(p *Part) { p.VNI = 0 },
		"VNI too high":    func(p *Part) { p.VNI = 1 << 24 },
		"version":         func(p *Part) { p.Version = math.MaxUint64 },
		"no VTEP":         func(p *Part) { p.VTEP = netip.Addr{} },
		"VTEP multicast":  func(p *Part) { p.VTEP = netip.MustParseAddr("224.0.0.1") },
		"MTU":             func(p *Part) { p.MTU = 1 << 16 },
		"subnets":         func(p *Part) { p.Subnets = make([]netip.Prefix, mostSubnets+1) },
		"endpoints":       func(p *Part) { p.Endpoints = many },
		"multicast MAC":   func(p *Part) { p.Endpoints = []Endpoint{{MAC: datapath.MAC{1}}} },
		"no MAC":          func(p *Part) { p.Endpoints = []Endpoint{{}} },
		"claim":           func(p *Part) { p.Endpoints = []Endpoint{{MAC: mac(1), Claim: math.MaxUint64}} },
		"address":         func(p *Part) { p.Endpoints = []Endpoint{{MAC: mac(1), Addrs: []netip.Addr{{}}}} },
		"mapped address":  func(p *Part) { p.VTEP = netip.MustParseAddr("::ffff:192.0.2.1") },
		"gone and future": func(p *Part) { *p = Part{Host: "b", VNI: 1, Gone: true, Version: math.MaxUint64} },
	}
	for _, name := range slices.Sorted(maps.Keys(bad)) {
		table := tableAt("a", newClock())
		table.Set(part(0, 1))
		p := part(1, 1)
		bad[name](&p)
		if fresh, err := table.Merge(p, 0); err == nil || fresh {
			t.Errorf("%s: not refused", name)
		}
	}
}

func BenchmarkView(b *testing.B) {
	table := tableAt("a", newClock())
	table.Set(part(0, 1))
	for i := 1; i <= 200; i++ {
		p := later(part(0, 1), 1)
		p.Host, p.VTEP = fmt.Sprintf("host-%d", i), netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
		for j := range 20 {
			p.Endpoints = append(p.Endpoints, Endpoint{MAC: mac(i*32 + j), Addrs: []netip.Addr{addr(i*32 + j)}, Claim: 5})
		}
		if _, err := table.Merge(p, 0); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		table.View(1)
	}
}
