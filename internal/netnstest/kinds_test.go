package netnstest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// verdict is a test that Needs may end, and what it said.
type verdict struct {
	testing.TB
	said string
}

func (v *verdict) Skipf(format string, args ...any) {
	v.said = "skip: " + fmt.Sprintf(format, args...)
}

func (v *verdict) Fatalf(format string, args ...any) {
	v.said = "fail: " + fmt.Sprintf(format, args...)
}

func TestNeedsKindThatNoKernelHas(t *testing.T) {
	for require, want := range map[string]string{"": "skip: ", "1": "fail: "} {
		t.Setenv("REQUIRE_KERNEL", require)
		v := &verdict{TB: t}
		Needs(v, "nosuchkind")
		if !strings.HasPrefix(v.said, want) || !strings.Contains(v.said, "nosuchkind") {
			t.Errorf("REQUIRE_KERNEL=%q: said %q, want %q and the kind", require, v.said, want)
		}
	}
}

func TestNeedsLeavesTheNamespaceAlone(t *testing.T) {
	Enter(t)
	before := inode(t)
	for range 2 {
		Needs(t, "macvlan")
	}
	if now := inode(t); now != before {
		t.Errorf("in %s, want %s", now, before)
	}
	h, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if n := l.Attrs().Name; n == "one" || n == "parent" {
			t.Errorf("left behind: %s", n)
		}
	}
}

// TestKinds makes what the kernel of make vm is there for.
func TestKinds(t *testing.T) {
	for kind, make := range map[string]func(attrs netlink.LinkAttrs) netlink.Link{
		"ipvlan": func(a netlink.LinkAttrs) netlink.Link {
			return &netlink.IPVlan{LinkAttrs: a, Mode: netlink.IPVLAN_MODE_L2}
		},
		"vlan": func(a netlink.LinkAttrs) netlink.Link {
			return &netlink.Vlan{LinkAttrs: a, VlanId: 100, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}
		},
		"dummy": func(a netlink.LinkAttrs) netlink.Link {
			a.ParentIndex = 0
			return &netlink.Dummy{LinkAttrs: a}
		},
	} {
		t.Run(kind, func(t *testing.T) {
			Needs(t, kind)
			Enter(t)
			if got := added(t, make(named("one", parent(t)))).Type(); got != kind {
				t.Errorf("made a %s", got)
			}
		})
	}
	t.Run("QinQ", func(t *testing.T) {
		Needs(t, "vlan")
		Enter(t)
		outer := added(t, &netlink.Vlan{LinkAttrs: named("outer", parent(t)), VlanId: 100, VlanProtocol: netlink.VLAN_PROTOCOL_8021AD})
		inner := added(t, &netlink.Vlan{LinkAttrs: named("inner", outer.Attrs().Index), VlanId: 10, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q})
		for _, want := range []struct {
			link     netlink.Link
			protocol netlink.VlanProtocol
			id       int
		}{{outer, netlink.VLAN_PROTOCOL_8021AD, 100}, {inner, netlink.VLAN_PROTOCOL_8021Q, 10}} {
			got, ok := want.link.(*netlink.Vlan)
			if !ok || got.VlanProtocol != want.protocol || got.VlanId != want.id {
				t.Errorf("made %+v, want VLAN %d of %s", want.link, want.id, want.protocol)
			}
		}
	})
}

func named(name string, parent int) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name, a.ParentIndex = name, parent
	return a
}

// parent is a new card's index.
func parent(t *testing.T) int {
	t.Helper()
	v := netlink.NewVeth(netlink.NewLinkAttrs())
	v.Name, v.PeerName = "card", "wire"
	return added(t, v).Attrs().Index
}

// added makes a link and reads it back.
func added(t *testing.T, l netlink.Link) netlink.Link {
	t.Helper()
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatalf("make %s: %v", l.Attrs().Name, err)
	}
	got, err := netlink.LinkByName(l.Attrs().Name)
	if err != nil {
		t.Fatal(err)
	}
	return got
}
