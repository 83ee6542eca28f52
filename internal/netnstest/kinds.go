package netnstest

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Needs skips a test, visibly, where the kernel has no links of that kind:
// "ipvlan", "vlan", "dummy", "macvlan" or another that takes no parent. With
// REQUIRE_KERNEL=1 in the environment it fails instead. It makes such a link,
// in a namespace of its own: a kernel that loads modules says what it has only
// when asked for it.
func Needs(tb testing.TB, kind string) {
	tb.Helper()
	ns := New(tb)
	h := ns.handle()
	defer h.Close()
	err := makeOne(h, kind)
	switch {
	case err == nil:
	case !errors.Is(err, unix.EOPNOTSUPP) || os.Getenv("REQUIRE_KERNEL") == "1":
		tb.Fatalf("needs a kernel with %s links: %v", kind, err)
	default:
		tb.Skipf("needs a kernel with %s links (make vm has one): %v", kind, err)
	}
}

// makeOne makes a link of a kind and deletes it again.
func makeOne(h *netlink.Handle, kind string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "one"
	if kind == "ipvlan" || kind == "vlan" || kind == "macvlan" {
		parent := netlink.NewVeth(netlink.NewLinkAttrs())
		parent.Name, parent.PeerName = "parent", "peer"
		if err := h.LinkAdd(parent); err != nil {
			return fmt.Errorf("make a parent: %w", err)
		}
		defer func() { _ = h.LinkDel(parent) }() // else it goes with the namespace
		p, err := h.LinkByName(parent.Name)
		if err != nil {
			return err
		}
		attrs.ParentIndex = p.Attrs().Index
	}
	var l netlink.Link
	switch kind {
	case "ipvlan":
		l = &netlink.IPVlan{LinkAttrs: attrs, Mode: netlink.IPVLAN_MODE_L2}
	case "vlan":
		l = &netlink.Vlan{LinkAttrs: attrs, VlanId: 10, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}
	case "macvlan":
		l = &netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}
	default:
		l = &netlink.GenericLink{LinkAttrs: attrs, LinkType: kind}
	}
	if err := h.LinkAdd(l); err != nil {
		return err
	}
	return h.LinkDel(l)
}
