package overlay

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/driver"
)

func prefixes(texts ...string) (list []netip.Prefix) {
	for _, s := range texts {
		list = append(list, netip.MustParsePrefix(s))
	}
	return list
}

// TestRangesOverlap: two hosts that choose addresses from the same range say so,
// as soon as one hears of the other, and no longer than that is so.
func TestRangesOverlap(t *testing.T) {
	for _, c := range []struct {
		own, others []netip.Prefix
		want        string // "" for nothing
	}{
		{prefixes("10.0.0.0/16"), prefixes("10.0.0.0/16"), "10.0.0.0/16, as this host does from 10.0.0.0/16"},
		{prefixes("10.0.1.0/24"), prefixes("10.0.0.0/16"), "10.0.0.0/16, as this host does from 10.0.1.0/24"},
		{prefixes("10.0.1.0/24"), prefixes("10.0.1.128/25"), "10.0.1.128/25, as this host does from 10.0.1.0/24"},
		{prefixes("10.0.1.0/24"), prefixes("10.0.2.0/24"), ""},
		{prefixes("10.0.1.0/24"), nil, ""},
		{nil, prefixes("10.0.1.0/24"), ""},
	} {
		table := tableAt("a", newClock())
		mine, p := part(0, 1), part(1, 1)
		mine.Ranges, p.Ranges, p.Version = c.own, c.others, 1
		table.Set(mine)
		table.Heard("b", "host-1")
		if _, err := table.Merge(p, 0); err != nil {
			t.Fatal(err)
		}
		got := strings.Join(table.View(1).Conflicts, "\n")
		if c.want == "" && got != "" || c.want != "" && (!strings.Contains(got, c.want) || !strings.Contains(got, "host host-1") || !strings.Contains(got, "--ip-range")) {
			t.Errorf("%v and %v: %q, want %q", c.own, c.others, got, c.want)
		}
		table.Silent("b")
		if got := table.View(1).Conflicts; len(got) > 0 {
			t.Errorf("%v and %v, which is silent: %q", c.own, c.others, got)
		}
	}
}

// TestRangesChange: another range is another part, which the others are told.
func TestRangesChange(t *testing.T) {
	table := tableAt("a", newClock())
	p := part(0, 1)
	table.Set(p)
	before := table.Own()[0].Version
	p.Ranges = prefixes("10.0.1.0/24")
	table.Set(p)
	if got := table.Own()[0]; got.Version <= before || !slices.Equal(got.Ranges, p.Ranges) {
		t.Errorf("version %d after %d, ranges %v", got.Version, before, got.Ranges)
	}
}

// TestRangesChecked: a range is a part of one of the subnets.
func TestRangesChecked(t *testing.T) {
	for _, list := range [][]netip.Prefix{
		prefixes("10.1.0.0/24"), prefixes("10.0.0.0/8"), prefixes("10.0.0.1/24"), {netip.Prefix{}},
		slices.Repeat(prefixes("10.0.1.0/24"), mostSubnets+1),
	} {
		p := part(1, 1)
		p.Ranges = list
		if err := p.check(1); err == nil {
			t.Errorf("%v is taken for ranges of 10.0.0.0/16", list)
		}
	}
	p := part(1, 1)
	p.Ranges = prefixes("10.0.1.0/24", "10.0.0.0/16")
	if err := p.check(1); err != nil {
		t.Error(err)
	}
}

// TestRangesTold: the overlap is in the log and in the status after a network is
// made.
func TestRangesTold(t *testing.T) {
	b := newBench(t)
	b.run()
	n := blue(4242)
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	n.Subnets[0].Range = netip.MustParsePrefix("10.44.1.0/24")
	b.c.Publish(n, []driver.Endpoint{})
	p := other("10.44.0.0/16")
	p.Ranges = prefixes("10.44.0.0/16")
	b.c.table.Heard("you", "there")
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	const line = "host there chooses addresses of VNI 4242 from 10.44.0.0/16, as this host does from 10.44.1.0/24"
	b.soon("the overlap is told", func() bool { return b.logged(line) })
	if c := b.c.Status().Conflicts; len(c) != 1 || !strings.Contains(c[0], line) {
		t.Errorf("conflicts %q", c)
	}
}

// TestGossipRanges: the overlap is known on both hosts right after the second has
// made its network, and over when one has a range of its own.
func TestGossipRanges(t *testing.T) {
	w := newWires()
	nodes := w.cluster(t, 2)
	set := func(x *node, text string) {
		p := part(0, 1)
		p.Name, p.VTEP, p.Ranges = x.name, x.addr, prefixes(text)
		x.table.Set(p)
	}
	told := func(x *node) bool {
		return slices.ContainsFunc(x.table.View(1).Conflicts, func(s string) bool { return strings.Contains(s, "--ip-range") })
	}
	set(nodes[0], "10.0.1.0/24")
	set(nodes[1], "10.0.0.0/16")
	within(t, 10*time.Second, "the overlap is told", func() bool { return told(nodes[0]) && told(nodes[1]) })
	set(nodes[1], "10.0.2.0/24")
	within(t, 10*time.Second, "it is over", func() bool { return !told(nodes[0]) && !told(nodes[1]) })
}

// TestRangesOverAnOldHost: a host of an older release passes parts on without their
// ranges. The host that it is about does not take that for something new, which it
// would tell all others each time, and who hears the ranges later takes them over.
func TestRangesOverAnOldHost(t *testing.T) {
	first := part(1, 1)
	first.Ranges = prefixes("10.0.1.0/24")
	a := tableAt(first.Host, newClock())
	a.Set(first)
	said := a.Own()[0]
	old := said
	old.Ranges = nil
	if _, err := a.Merge(old, 0); err != nil {
		t.Fatal(err)
	}
	if got := a.Own()[0]; got.Version != said.Version {
		t.Errorf("version %d after %d, with the same ranges %v", got.Version, said.Version, got.Ranges)
	}
	second := part(0, 1)
	second.Ranges = prefixes("10.0.0.0/16")
	b := tableAt("c", newClock())
	b.Set(second)
	b.Heard(first.Host, "host-1")
	for n, p := range []Part{old, said, old, said} {
		fresh, err := b.Merge(p, 0)
		if err != nil || fresh != (n < 2) {
			t.Errorf("part %d: fresh %v, %v", n, fresh, err)
		}
	}
	if c := b.View(1).Conflicts; len(c) != 1 || !strings.Contains(c[0], "10.0.1.0/24") {
		t.Errorf("conflicts %q", c)
	}
}
