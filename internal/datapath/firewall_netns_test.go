package datapath

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/netnstest"
)

// sample has an element in every set, and two where that says more.
func sample() []Element {
	els := []Element{
		{Set: SetBridges, Link: "wf0123456789ab"},
		{Set: SetPass, Link: "wf0123456789ab", Out: "wf0123456789ab"},
		{Set: SetPass, Link: "fifteen-letters", Out: "x"},
		{Set: SetInternal, Link: "wfi"},
		{Set: SetTunnels, Port: 4793},
		{Set: SetProxied, Net: anyHost[1], Proto: TCP, Port: 80},
		{Set: SetProxied, Net: netip.MustParsePrefix("fd00::1/128"), Proto: UDP, Port: 80},
		{Set: SetProxied, Net: anyHost[1], Proto: UDP, Port: 90, More: 9},
		{Set: SetMasquerade, Net: netip.MustParsePrefix("10.0.0.0/24")},
		{Set: SetMasquerade, Net: netip.MustParsePrefix("10.0.1.0/24")}, // adjacent
		{Set: SetMasquerade, Net: netip.MustParsePrefix("10.0.4.0/22")},
		{Set: SetMasquerade, Net: netip.MustParsePrefix("255.255.255.0/24")}, // up to the end
	}
	for i, every := range anyHost {
		host, to := subnet(200, 1)[i].Addr(), subnet(1, 2)[i].Addr()
		net := subnet(1, 0)[i].Masked()
		els = append(els,
			Element{Set: SetOpen, Link: "wfo", Net: every},
			Element{Set: SetRouted, Link: "wfr", Net: every},
			Element{Set: SetExposed, Net: hostPrefix(to), Proto: SCTP, Port: 65535},
			Element{Set: SetTrusted, Link: "fifteen-letters", Net: hostPrefix(to), Proto: UDP, Port: 1},
			Element{Set: SetMasquerade, Net: net},
			Element{Set: SetSNAT, Net: net, To: host},
			Element{Set: SetHairpin, Net: net, Link: "wfa"},
			Element{Set: SetHairpin, Net: net, Link: "wfb"}, // the same subnet twice
			Element{Set: SetBeside, Net: net, To: to},
			Element{Set: SetBeside, Net: net, To: to.Next()},
			Element{Set: SetHome, Net: net, Link: "br0"},
			Element{Set: SetMembers, Net: hostPrefix(host), Port: 4793},
			Element{Set: SetMembers, Net: hostPrefix(host), Port: 65535},
			Element{Set: SetAttached, Link: "br0", Net: hostPrefix(to)},
			Element{Set: SetPublished, Net: every, Proto: TCP, Port: 80, To: to, ToPort: 8080},
			Element{Set: SetPublished, Net: hostPrefix(host), Proto: UDP, Port: 80, To: to, ToPort: 8080},
		)
	}
	return els
}

func lines(els []Element) []string {
	s := make([]string, len(els))
	for i, e := range els {
		s[i] = e.String()
	}
	slices.Sort(s)
	return s
}

func openFirewall(tb testing.TB) *firewall {
	tb.Helper()
	f, err := newFirewall(quiet(), tableName)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(f.close)
	return f
}

func mustAdd(tb testing.TB, f *firewall, els ...Element) []string {
	tb.Helper()
	changed, err := f.add(tb.Context(), els)
	if err != nil {
		tb.Fatal(err)
	}
	return changed
}

func wantOwned(tb testing.TB, f *firewall, want []Element) {
	tb.Helper()
	got, err := f.owned(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	if d := cmp.Diff(lines(want), lines(got)); d != "" {
		tb.Errorf("owned (-want +got):\n%s", d)
	}
}

func TestFirewallElements(t *testing.T) {
	netnstest.Enter(t)
	f := openFirewall(t)
	wantOwned(t, f, nil)
	els := sample()
	changed := mustAdd(t, f, append(els, els[0])...)
	if want := append([]string{"nft add table inet weft"}, lines(els)...); !slices.Equal(append(changed[:1:1], slices.Sorted(slices.Values(changed[1:]))...), want) {
		t.Errorf("changed %q", changed)
	}
	wantOwned(t, f, els)
	if changed := mustAdd(t, f, els...); len(changed) != 0 {
		t.Errorf("the second time changed %q", changed)
	}
	// Every element goes and comes by itself, too.
	for i, e := range els {
		if err := f.remove(t.Context(), []Element{e}); err != nil {
			t.Fatal(err)
		}
		if err := f.remove(t.Context(), []Element{e}); err != nil {
			t.Fatalf("absent: %v", err)
		}
		wantOwned(t, f, slices.Delete(slices.Clone(els), i, i+1))
		if changed := mustAdd(t, f, els...); len(changed) != 1 || changed[0] != e.String() {
			t.Errorf("changed %q, want %s", changed, e)
		}
	}
	if err := f.remove(t.Context(), els); err != nil {
		t.Fatal(err)
	}
	wantOwned(t, f, nil)
}

func TestFirewallRefuses(t *testing.T) {
	netnstest.Enter(t)
	f := openFirewall(t)
	els := sample()
	mustAdd(t, f, els...)
	good := Element{Set: SetBridges, Link: "good"}
	to := netip.MustParseAddr("10.1.0.9")
	for _, tt := range []struct {
		name string
		e    Element
		want string
	}{
		{"set", Element{Set: "sets", Link: "x"}, "no such set"},
		{"long name", Element{Set: SetBridges, Link: "sixteen-letters-"}, "not a link name"},
		{"no name", Element{Set: SetBridges, Link: "a\x00b"}, "not a link name"},
		{"not a subnet", Element{Set: SetMasquerade, Net: netip.MustParsePrefix("10.9.0.1/24")}, "not a subnet"},
		{"no subnet", Element{Set: SetMasquerade}, "not a subnet"},
		{"not a host", Element{Set: SetAttached, Link: "x", Net: netip.MustParsePrefix("10.9.0.0/24")}, "fields"},
		{"other family", Element{Set: SetSNAT, Net: netip.MustParsePrefix("fd09::/64"), To: to}, "same family"},
		{"no target", Element{Set: SetPublished, Net: anyHost[0], Proto: TCP, Port: 1}, "same family"},
		{"mapped", Element{Set: SetExposed, Net: netip.MustParsePrefix("::ffff:10.0.0.1/128"), Proto: TCP, Port: 1}, "ambiguous"},
		{"field too many", Element{Set: SetBridges, Link: "x", Port: 1}, "fields"},
		{"family too much", Element{Set: SetBridges, Link: "x", Net: anyHost[1]}, "no such set"},
		{"part of a family", Element{Set: SetOpen, Link: "x", Net: netip.MustParsePrefix("10.0.0.0/8")}, "fields"},
		{"key taken", Element{Set: SetPublished, Net: anyHost[0], Proto: TCP, Port: 80, To: to, ToPort: 1}, "tcp . 80 : 10.1.0.2 . 8080 } is there already"},
		{"overlap", Element{Set: SetMasquerade, Net: netip.MustParsePrefix("10.0.0.0/16")}, "masquerade { 10.0."},
		{"inside", Element{Set: SetMasquerade, Net: netip.MustParsePrefix("10.0.5.0/24")}, "10.0.4.0/22 } is there already"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.add(t.Context(), []Element{good, tt.e})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
			wantOwned(t, f, els) // without good: all or nothing
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.add(ctx, []Element{good}); err == nil {
		t.Error("a cancelled call succeeded")
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if err := f.remove(ctx, els); err == nil {
		t.Error("a call past its deadline succeeded")
	}
	wantOwned(t, f, els)
	mustAdd(t, f, good)
	wantOwned(t, f, append(els, good))
}

// What others may do to our table, and how it is noticed.
var damages = []struct {
	name, do string
	lost     int // elements that owned no longer shows; -1: all
}{
	{"flush ruleset", "flush ruleset", -1},
	{"delete table", "delete table inet weft", -1},
	{"flush table", "flush table inet weft", -1},
	{"flush chain", "flush chain inet weft ok", -1},
	{"delete rule", "delete rule inet weft forward handle 1RULE", -1},
	{"replace rule", "replace rule inet weft forward handle 1RULE accept", -1},
	{"insert rule", "insert rule inet weft to_bridge accept", -1},
	{"add chain", "add chain inet weft mine", -1},
	{"chain policy", "add chain inet weft forward { policy drop; }", -1},
	{"odd element", "add element inet weft masquerade4 { 10.9.0.1-10.9.0.2 }", -1},
	{"chain and set", "add chain inet weft mine; add set inet weft odd { type ether_addr; }", -1},
	{"delete element", `delete element inet weft bridges { "wf0123456789ab" }`, 1},
	{"flush set", `flush set inet weft pass`, 2},
	{"flush map", `flush map inet weft published_any6`, 1},
}

var firstRule = regexp.MustCompile(`(?m)chain forward \{[^}]*?# handle \d+\n[^\n]*\n[^\n]*# handle (\d+)`)

func TestFirewallRepair(t *testing.T) {
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			ns := netnstest.Enter(t)
			f := openFirewall(t)
			if err := f.setFamilies(t.Context(), setGuard, true, false); err != nil {
				t.Fatal(err)
			}
			if err := f.setUplinks(t.Context(), []string{"br0"}); err != nil {
				t.Fatal(err)
			}
			els := sample()
			mustAdd(t, f, els...)
			before := ns.Exec("nft", "-s", "list", "ruleset")
			do := tt.do
			if strings.Contains(do, "1RULE") {
				m := firstRule.FindStringSubmatch(ns.Exec("nft", "-a", "list", "table", "inet", "weft"))
				if m == nil {
					t.Fatal("no rule in chain forward")
				}
				do = strings.ReplaceAll(do, "1RULE", m[1])
			}
			ns.Exec("nft", do)
			have, err := f.owned(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			lost := len(els) - len(have)
			if want := tt.lost; lost != want && (want >= 0 || len(have) != 0) {
				t.Fatalf("after %s %d elements are missing, want %d", tt.do, lost, want)
			}
			// One element is enough to bring all back.
			one := State{Elements: els}.Minus(State{Elements: have}).Elements[:1]
			if tt.lost > 0 {
				one = els
			}
			if changed := mustAdd(t, f, one...); len(changed) == 0 {
				t.Error("nothing was repaired")
			}
			wantOwned(t, f, els)
			if d := cmp.Diff(sortedLines(before), sortedLines(ns.Exec("nft", "-s", "list", "ruleset"))); d != "" {
				t.Errorf("the table is not what it was (-before +after):\n%s", d)
			}
		})
	}
}

// sortedLines is for comparing listings: the order of elements is by chance.
func sortedLines(s string) []string {
	f := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == ',' })
	for i := range f {
		f[i] = strings.TrimSpace(strings.NewReplacer("elements = {", "", "}", "").Replace(f[i]))
	}
	slices.Sort(f)
	return f
}

// Between two reconciliations nobody has noticed the damage.
func TestFirewallRepairUnnoticed(t *testing.T) {
	extra := Element{Set: SetBridges, Link: "new"}
	table := "nft add table inet weft"
	for _, do := range []string{"flush ruleset", `delete element inet weft bridges { "wf0123456789ab" }`} {
		t.Run(do, func(t *testing.T) {
			ns := netnstest.Enter(t)
			f := openFirewall(t)
			els := sample()
			mustAdd(t, f, els...)
			ns.Exec("nft", do)
			if err := f.remove(t.Context(), els[:2]); err != nil {
				t.Fatal(err)
			}
			wantOwned(t, f, els[2:])
			// What another call mended add still tells.
			if err := f.setUplinks(t.Context(), []string{do[:5]}); err != nil {
				t.Fatal(err)
			}
			if changed := mustAdd(t, f); slices.Contains(changed, table) != (do == "flush ruleset") {
				t.Errorf("changed %q", changed)
			}
			ns.Exec("nft", "delete table inet weft")
			if changed := mustAdd(t, f, extra); !slices.Equal(changed, []string{table, extra.String()}) {
				t.Errorf("changed %q", changed)
			}
			wantOwned(t, f, append(slices.Clone(els[2:]), extra))
			ns.Exec("nft", `add element inet weft bridges { "there" }`)
			mustAdd(t, f, Element{Set: SetBridges, Link: "there"})
			if err := f.remove(t.Context(), []Element{{Set: SetBridges, Link: "there"}, extra}); err != nil {
				t.Fatal(err)
			}
			wantOwned(t, f, els[2:])
		})
	}
}

// The next process takes a good table over without touching it.
func TestFirewallAdopts(t *testing.T) {
	ns := netnstest.Enter(t)
	first := openFirewall(t)
	els := sample()
	mustAdd(t, first, els...)
	first.close()
	before := ns.Exec("nft", "-a", "list", "ruleset") // with handles
	second := openFirewall(t)
	if changed := mustAdd(t, second, els...); len(changed) != 0 {
		t.Errorf("changed %q", changed)
	}
	wantOwned(t, second, els)
	if d := cmp.Diff(before, ns.Exec("nft", "-a", "list", "ruleset")); d != "" {
		t.Errorf("the table changed:\n%s", d)
	}
}

// A table of another version is replaced with its elements.
func TestFirewallReplacesOtherVersion(t *testing.T) {
	ns := netnstest.Enter(t)
	old := openFirewall(t)
	old.rs.version = "0000dead"
	old.rs.rules = old.rs.rules[:len(old.rs.rules)-3]
	// It had another form of one set, and one set that is no more.
	for i := range old.rs.sets {
		if d := &old.rs.sets[i]; d.set == SetPass {
			d.key = d.key[:1]
			old.rs.rules = slices.DeleteFunc(old.rs.rules, func(r rule) bool { return r.chain == "forward" || r.chain == "prerouting" })
			old.rs.bySet[d.lookup()] = *d
		}
	}
	els := slices.DeleteFunc(sample(), func(e Element) bool { return e.Set == SetPass })
	mustAdd(t, old, append(els, Element{Set: setUplinks, Link: "br0"})...)
	old.close()
	ns.Exec("nft", `add set inet weft gone { type ifname; elements = { "x" }; }`)

	f := openFirewall(t)
	wantOwned(t, f, els)
	if !f.have[Element{Set: setUplinks, Link: "br0"}] {
		t.Error("the uplink is gone")
	}
	if out := ns.Exec("nft", "list", "table", "inet", "weft"); strings.Contains(out, "0000dead") || strings.Contains(out, "gone") {
		t.Errorf("something of the old table is left:\n%s", out)
	}
}

// Nothing but our table changes, whatever we do.
func TestFirewallLeavesOthersAlone(t *testing.T) {
	ns := netnstest.Enter(t)
	ns.Exec("nft", `table inet filter {
  set s { type ipv4_addr; elements = { 10.0.0.1 }; }
  chain forward { type filter hook forward priority 0; policy drop
    ip saddr @s accept
  }
}
table ip weft {
  chain mine {
    counter drop
  }
}
table inet weft2 {
  chain mine {
    accept
  }
}`)
	ns.Exec("iptables-nft", "-A", "FORWARD", "-s", "10.0.0.0/8", "-j", "DROP")
	ns.Exec("iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
	before := ns.Exec("nft", "-a", "list", "ruleset")
	f := openFirewall(t)
	h := newHook(quiet(), "weft")
	els := sample()
	for range 2 {
		mustAdd(t, f, els...)
		if _, err := h.ensure(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantOwned(t, f, els)
		ns.Exec("nft", "flush table inet weft")
		wantOwned(t, f, nil)
		if err := f.remove(t.Context(), els[:3]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	ns.Exec("nft", "delete table inet weft")
	if d := cmp.Diff(before, ns.Exec("nft", "-a", "list", "ruleset")); d != "" {
		t.Errorf("others' tables (-before +after):\n%s", d)
	}
}

// What we build reads in nft as the rules that we mean.
func TestFirewallListing(t *testing.T) {
	ns := netnstest.Enter(t)
	f := openFirewall(t)
	mustAdd(t, f, sample()...)
	out := ns.Exec("nft", "-s", "list", "table", "inet", "weft")
	for _, want := range []string{
		"type filter hook forward priority filter - 1; policy accept;",
		"iifname @bridges iifname != @internal iifname . iifname != @pass return",
		"iifname . oifname @pass goto ok",
		"iifname @internal ip6 daddr . meta l4proto . th dport @proxied_range6 drop",
		"oifname . ip6 daddr @attached6 goto ok",
		`meta iifkind "bridge" iifname != @uplinks accept`,
		"ct state established,related goto ok",
		"ct status dnat ip saddr . oifname @hairpin4 masquerade",
		"ct status dnat ip6 saddr . ip6 daddr @beside6 masquerade",
		"ip6 daddr . meta l4proto . th dport @exposed6 goto ok",
		"dnat ip6 to ip6 daddr . meta l4proto . th dport map @published6",
		"snat ip to ip saddr map @snat4",
		"meta mark set meta mark | 0x10000000 accept",
		"meta nfproto != @guard accept",
		"meta nfproto @lifted accept",
		"udp dport @tunnels goto tunnel",
		"ip6 saddr . th dport @members6 notrack",
		"ct state untracked accept",
		`meta iifkind "bridge" fib saddr . iif oif missing accept`,
		"meta iiftype loopback accept",
		`elements = { "wf0123456789ab" }`,
		"10.0.0.0/24, 10.0.1.0/24",
		"10.200.0.1 . udp . 80 : 10.1.0.2 . 8080",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("not in the listing: %s", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
	// nft reads its own listing of our table, and makes the same of it.
	ns2 := netnstest.New(t)
	file := t.TempDir() + "/weft.nft"
	ns.Exec("sh", "-c", "nft -s list table inet weft > "+file)
	ns2.Exec("nft", "-f", file)
	if d := cmp.Diff(sortedLines(out), sortedLines(ns2.Exec("nft", "-s", "list", "table", "inet", "weft"))); d != "" {
		t.Errorf("nft makes something else of it:\n%s", d)
	}
}

// portElements are n published ports, each of another container.
func portElements(n int) []Element {
	els := make([]Element, n)
	to := netip.MustParseAddr("10.1.0.0")
	for i := range els {
		to = to.Next()
		els[i] = Element{Set: SetPublished, Net: anyHost[0], Proto: TCP, Port: uint16(i + 1), To: to, ToPort: 80}
	}
	return els
}

func TestFirewallTenThousand(t *testing.T) {
	ns := netnstest.Enter(t)
	f := openFirewall(t)
	els := portElements(10000)
	for range 2 {
		start := time.Now()
		mustAdd(t, f, els...)
		t.Logf("added in %v", time.Since(start))
		start = time.Now()
		wantOwned(t, f, els)
		t.Logf("read in %v", time.Since(start))
		ns.Exec("nft", "flush ruleset") // and all at once from memory
		mustAdd(t, f, Element{Set: SetBridges, Link: "x"})
		wantOwned(t, f, append(slices.Clone(els), Element{Set: SetBridges, Link: "x"}))
		start = time.Now()
		if err := f.remove(t.Context(), append(els, Element{Set: SetBridges, Link: "x"})); err != nil {
			t.Fatal(err)
		}
		t.Logf("removed in %v", time.Since(start))
		wantOwned(t, f, nil)
	}
}

// Many at once, while others make the kernel's rule set change.
func TestFirewallConcurrent(t *testing.T) {
	ns := netnstest.Enter(t)
	f := openFirewall(t)
	els := portElements(400)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for _, e := range els[g*100 : g*100+100] {
				if _, err := f.add(t.Context(), []Element{e}); err != nil {
					t.Error(err)
				}
				if e.Port%2 == 0 {
					if err := f.remove(t.Context(), []Element{e}); err != nil {
						t.Error(err)
					}
				}
				if e.Port%25 == 0 {
					if _, err := f.owned(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for i := range 20 {
		ns.Exec("nft", fmt.Sprintf("add table inet other%d", i))
	}
	wg.Wait()
	wantOwned(t, f, slices.DeleteFunc(els, func(e Element) bool { return e.Port%2 == 0 }))
}

// The time of a change must not depend on what is there. The two tables take
// turns, so that what else the machine does hits both.
func BenchmarkElement(b *testing.B) {
	e := []Element{{Set: SetPublished, Net: anyHost[0], Proto: UDP, Port: 1, To: netip.MustParseAddr("10.1.0.1"), ToPort: 80}}
	sizes := []int{10, 10000}
	tables := make([]*firewall, len(sizes))
	took := make([][]time.Duration, len(sizes))
	for i, n := range sizes {
		netnstest.New(b).Do(func() { tables[i] = openFirewall(b) })
		mustAdd(b, tables[i], portElements(n)...)
	}
	b.ResetTimer()
	for range b.N {
		for i, f := range tables {
			start := time.Now()
			mustAdd(b, f, e...)
			if err := f.remove(b.Context(), e); err != nil {
				b.Fatal(err)
			}
			took[i] = append(took[i], time.Since(start))
		}
	}
	median := make([]float64, len(sizes))
	for i, n := range sizes {
		slices.Sort(took[i])
		median[i] = float64(took[i][len(took[i])/2])
		b.ReportMetric(median[i], fmt.Sprintf("ns/pair@%d", n))
	}
	b.ReportMetric(median[1]/median[0], "ratio")
}
