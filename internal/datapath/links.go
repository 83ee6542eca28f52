package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// deleters is how many deletions run side by side. One waits some 17 ms for
// RCU grace periods and works for a fraction of one: 100 pairs take 1/6 of the
// time one by one with 8 of them, 1/12 with 16, 1/18 with 32, and 64 gain
// nothing more.
const deleters = 32

// links makes and removes bridges and veth pairs. All its sockets are opened
// once, in the namespace of whoever calls newLinks.
type links struct {
	change  *rtnl
	dumps   *rtnl           // its own, so that a long answer keeps no change waiting
	deletes chan *rtnl      // a pool: a socket is taken for as long as its deletion waits
	lib     *netlink.Handle // addresses and routes
	ioctl   int             // a socket for index
	packet  int             // a socket for Announce; it hears nothing
}

func newLinks(in instance) (_ *links, err error) {
	l := &links{deletes: make(chan *rtnl, deleters), ioctl: -1, packet: -1}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.change, err = newRTNL(in.group); err != nil {
		return nil, err
	}
	if l.dumps, err = newRTNL(in.group); err != nil {
		return nil, err
	}
	for range deleters {
		c, err := newRTNL(in.group)
		if err != nil {
			return nil, err
		}
		l.deletes <- c
	}
	if l.lib, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := l.lib.SetSocketTimeout(answerTimeout); err != nil {
		return nil, fmt.Errorf("set netlink timeout: %w", err)
	}
	if l.ioctl, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	if l.packet, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	return l, nil
}

// close ends all sockets; nothing may be running.
func (l *links) close() {
	for _, c := range []*rtnl{l.change, l.dumps} {
		if c != nil {
			c.close()
		}
	}
	for len(l.deletes) > 0 {
		(<-l.deletes).close()
	}
	if l.lib != nil {
		l.lib.Close()
	}
	for _, fd := range []int{l.ioctl, l.packet} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// index finds a link's number. The old call needs no RTNL lock, where a
// netlink request would queue behind everybody's creations and deletions.
func (l *links) index(name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("link name %q: %w", name, err)
	}
	err = unix.IoctlIfreq(l.ioctl, unix.SIOCGIFINDEX, req)
	if errors.Is(err, unix.ENODEV) {
		return 0, ErrAbsent
	}
	if err != nil {
		return 0, fmt.Errorf("look up link %s: %w", name, err)
	}
	return int(req.Uint32()), nil
}

// existing checks a bridge that somebody else made.
func (l *links) existing(name string) error {
	have, err := l.change.get(name)
	switch {
	case errors.Is(err, ErrAbsent):
		return fmt.Errorf("bridge %s does not exist", name)
	case err != nil:
		return err
	case have.kind != "bridge":
		return fmt.Errorf("%s is not a bridge but %s", name, kindName(have.kind))
	}
	return nil
}

func kindName(kind string) string {
	if kind == "" {
		return "a network card"
	}
	return "of kind " + kind
}

// own checks that a link found under one of our names was made by us.
func (l link) own(kind string) error {
	if l.another() {
		return fmt.Errorf("%s exists and belongs to another instance of weft (link group %#x)", l.name, l.group)
	}
	if !l.ours() {
		return fmt.Errorf("%s exists and is not ours (link group %d)", l.name, l.group)
	}
	if l.kind != kind {
		return fmt.Errorf("%s exists and is not a %s but %s", l.name, kind, kindName(l.kind))
	}
	return nil
}

// bridge makes or mends a bridge, without its addresses.
func (l *links) bridge(b Bridge, d *done) error {
	want := link{name: b.Name, kind: "bridge", mtu: b.MTU, mac: b.MAC, up: true, noSnooping: b.NoSnooping}
	have, err := l.change.get(b.Name)
	if errors.Is(err, ErrAbsent) {
		return l.newBridge(want, b, d)
	}
	if err != nil {
		return err
	}
	if err := have.own("bridge"); err != nil {
		return fmt.Errorf("bridge %w", err)
	}
	return l.mend(have, want, d)
}

// newBridge makes a bridge in one message, and gives it its MTU in a second
// one: an MTU in the creating message is not remembered as somebody's wish, and
// the bridge would go back to 1500 when its last port leaves.
func (l *links) newBridge(want link, b Bridge, d *done) error {
	mtu := want.mtu
	want.mtu = 0
	var data []*nl.RtAttr
	if b.NoSnooping {
		data = append(data, snoopingOff())
	}
	if err := l.change.create(want, data...); err != nil {
		return fmt.Errorf("create bridge %s: %w", b.Name, err)
	}
	d.made.Bridges = append(d.made.Bridges, b)
	d.say("bridge %s: made", b.Name)
	if mtu == 0 || mtu == defaultMTU {
		return nil
	}
	have, err := l.change.get(b.Name)
	if err == nil {
		err = l.change.set(link{index: have.index, mtu: mtu, up: true})
	}
	if err != nil {
		return fmt.Errorf("create bridge %s: set MTU %d: %w", b.Name, mtu, err)
	}
	return nil
}

// mend changes what differs of a link that exists, in one message.
func (l *links) mend(have, want link, d *done) error {
	fix := link{index: have.index, kind: have.kind, up: true}
	var lines []string
	if want.master != 0 && have.master != want.master {
		fix.master = want.master
		lines = append(lines, "put into its bridge")
	}
	if want.mtu != 0 && have.mtu != want.mtu {
		fix.mtu = want.mtu
		lines = append(lines, fmt.Sprintf("mtu %d, was %d", want.mtu, have.mtu))
	}
	if want.mac != (MAC{}) && have.mac != want.mac {
		fix.mac = want.mac
		lines = append(lines, fmt.Sprintf("address %s, was %s", want.mac, have.mac))
	}
	var data []*nl.RtAttr
	if want.noSnooping && !have.noSnooping {
		data = append(data, snoopingOff())
		lines = append(lines, "multicast snooping off")
	}
	if !have.up {
		lines = append(lines, "set up")
	}
	if len(lines) == 0 {
		return nil
	}
	if err := l.change.set(fix, data...); err != nil {
		return fmt.Errorf("mend %s %s (%v): %w", have.kind, have.name, lines, err)
	}
	for _, line := range lines {
		d.say("%s %s: %s", have.kind, have.name, line)
	}
	return nil
}

// addresses makes the addresses of a link of ours equal to want.
func (l *links) addresses(ctx context.Context, kind, name string, want []netip.Prefix, d *done) error {
	br, err := l.change.get(name)
	if err != nil {
		return fmt.Errorf("%s %s: %w", kind, name, err)
	}
	all, err := l.addressesOf(ctx)
	if err != nil {
		return err
	}
	have := all[br.index]
	// Surplus ones go first: deleting an IPv4 address takes the others of
	// its subnet with it if it was there before them.
	for _, p := range have {
		if slices.Contains(want, p) {
			continue
		}
		if err := l.delAddress(br.index, p); err != nil {
			return fmt.Errorf("%s %s: remove address %s: %w", kind, name, p, err)
		}
		d.say("%s %s: address %s removed", kind, name, p)
	}
	for _, p := range want {
		err := l.addAddress(br.index, p)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s %s: add address %s: %w", kind, name, p, err)
		}
		if !slices.Contains(have, p) {
			d.addrs = append(d.addrs, linkAddr{name, p})
		}
		d.say("%s %s: address %s added", kind, name, p)
	}
	return nil
}

// addressesOf returns the addresses of every link. Link-local IPv6 addresses
// are the kernel's business and left out.
func (l *links) addressesOf(ctx context.Context) (map[int][]netip.Prefix, error) {
	return l.addressesWith(ctx, func(netlink.Addr) bool { return true })
}

func (l *links) addressesWith(ctx context.Context, want func(netlink.Addr) bool) (map[int][]netip.Prefix, error) {
	list, err := dump(ctx, func() ([]netlink.Addr, error) { return l.lib.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := make(map[int][]netip.Prefix)
	for _, a := range list {
		p, ok := prefixOf(a.IPNet)
		if !ok || p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() || !want(a) {
			continue
		}
		out[a.LinkIndex] = append(out[a.LinkIndex], p)
	}
	return out, nil
}

// dropAddress undoes an addition; absent is success.
func (l *links) dropAddress(a linkAddr) error {
	br, err := l.change.get(a.link)
	if errors.Is(err, ErrAbsent) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := l.delAddress(br.index, a.addr); err != nil {
		return fmt.Errorf("%s: remove address %s: %w", a.link, a.addr, err)
	}
	return nil
}

func (l *links) addAddress(index int, p netip.Prefix) error {
	return l.lib.AddrAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Index: index}}, libAddr(p))
}

// delAddress removes an address; absent is success.
func (l *links) delAddress(index int, p netip.Prefix) error {
	err := l.lib.AddrDel(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Index: index}}, libAddr(p))
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

// libAddr is p as the library wants it. An IPv6 address is usable at once:
// duplicate detection cannot run before the bridge has a port, and a gateway
// address has no rival.
func libAddr(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{
		IP:   net.IP(p.Addr().AsSlice()),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// prefixOf is the way back.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, bits := n.Mask.Size()
	if addr.Is4In6() && bits == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, ones), true
}

// veth makes or mends a pair. This is the hot path: a container start waits
// for it, so a new pair without port flags costs one message.
func (l *links) veth(v Veth, d *done) error {
	master, err := l.index(v.Master)
	if err != nil {
		return fmt.Errorf("create veth %s: bridge %s: %w", v.Name, v.Master, err)
	}
	want := link{name: v.Name, kind: "veth", master: master, mtu: v.MTU, mac: hostMAC(v.PeerMAC), up: true,
		isolated: v.Isolated, hairpin: v.Hairpin}
	err = l.change.create(want, vethPeer(v))
	made := err == nil
	switch {
	case made, errors.Is(err, unix.EEXIST):
	case errors.Is(err, unix.EXFULL):
		return fmt.Errorf("create veth %s: bridge %s has no port left (the kernel allows 1023)", v.Name, v.Master)
	case l.existing(v.Master) != nil:
		return fmt.Errorf("create veth %s: %w", v.Name, l.existing(v.Master))
	default:
		return fmt.Errorf("create veth %s in %s: %w", v.Name, v.Master, err)
	}
	if made {
		d.made.Veths = append(d.made.Veths, v)
		d.say("veth %s: made in %s", v.Name, v.Master)
		if !v.Isolated && !v.Hairpin {
			return nil
		}
	}
	have, err := l.change.get(v.Name)
	if errors.Is(err, ErrAbsent) {
		return fmt.Errorf("create veth %s: its other end %s exists already", v.Name, v.Peer)
	}
	if err != nil {
		return err
	}
	if err := have.own("veth"); err != nil {
		return fmt.Errorf("veth %w", err)
	}
	if err := l.mend(have, want, d); err != nil {
		return err
	}
	return l.portFlags(have, want, made, d)
}

// hostMAC is the address of the host's end of a pair. A bridge without an
// address of its own takes the lowest of its ports', so a random one would
// now and then change the address of somebody else's bridge: ours is high.
func hostMAC(peer MAC) MAC {
	if peer == (MAC{}) {
		return MAC{}
	}
	host := peer
	if host[0] = 0xfe; peer[0] == 0xfe {
		host[0] = 0xfa
	}
	return host
}

// portFlags sets the flags of a port that differ from those wanted.
func (l *links) portFlags(have, want link, made bool, d *done) error {
	if have.master != want.master { // just put back; a new port has no flags
		have.isolated, have.hairpin = false, false
	}
	if have.isolated == want.isolated && have.hairpin == want.hairpin {
		return nil
	}
	want.index = have.index
	if err := l.change.setPort(want); err != nil {
		return fmt.Errorf("veth %s: set port flags: %w", have.name, err)
	}
	if !made {
		d.say("veth %s: isolated %t, hairpin %t", have.name, want.isolated, want.hairpin)
	}
	return nil
}

// doomed is a link to delete.
type doomed struct{ name, kind string }

// remove deletes links side by side. Those that are absent are success, and so
// are those that are not ours, which stay.
func (l *links) remove(ctx context.Context, list []doomed) error {
	if len(list) == 1 {
		return l.removeOne(ctx, list[0])
	}
	errs := make([]error, len(list))
	var next sync.Mutex
	i := 0
	take := func() int {
		next.Lock()
		defer next.Unlock()
		i++
		return i - 1
	}
	var wg sync.WaitGroup
	for range min(deleters, len(list)) {
		wg.Go(func() {
			for n := take(); n < len(list); n = take() {
				errs[n] = l.removeOne(ctx, list[n])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (l *links) removeOne(ctx context.Context, x doomed) error {
	var c *rtnl
	select {
	case c = <-l.deletes:
		defer func() { l.deletes <- c }()
	case <-ctx.Done():
		return fmt.Errorf("remove %s %s: %w", x.kind, x.name, ctx.Err())
	}
	have, err := c.get(x.name)
	if errors.Is(err, ErrAbsent) {
		return nil
	}
	if err != nil {
		return err
	}
	// Somebody else's under that name: ours, if there was one, is gone.
	if have.own(x.kind) != nil {
		return nil
	}
	if err := c.remove(have.index); err != nil {
		return fmt.Errorf("remove %s %s: %w", x.kind, x.name, err)
	}
	return nil
}

// owned returns what is ours among list.
func (l *links) owned(ctx context.Context, list []link) (s State, err error) {
	addrs, err := l.addressesOf(ctx)
	if err != nil {
		return s, err
	}
	at := make(map[int]link, len(list))
	// Whether snooping is off on other bridges is not our business.
	tunnelled := make(map[int]bool)
	for _, x := range list {
		at[x.index] = x
		if x.ours() && x.kind == kindVXLAN {
			tunnelled[x.master] = true
		}
	}
	for _, x := range list {
		if !x.ours() {
			continue
		}
		// A VLAN sub-interface cannot be in another namespace than the link below
		// it, and neither can what has not been handed to a container yet.
		var lower link
		if !x.away {
			lower = at[x.peer]
		}
		below := lower.name
		switch x.kind {
		case "bridge":
			s.Bridges = append(s.Bridges, Bridge{Name: x.name, MAC: x.mac, MTU: x.mtu, Addrs: addrs[x.index], Down: !x.up,
				NoSnooping: x.noSnooping && tunnelled[x.index]})
		case kindVXLAN:
			s.VXLANs = append(s.VXLANs, x.asVXLAN(at[x.master].name))
		case "veth":
			s.Veths = append(s.Veths, Veth{Name: x.name, Peer: below, Master: at[x.master].name, MTU: x.mtu, Isolated: x.isolated, Hairpin: x.hairpin, Down: !x.up})
		case kindVLAN, kindDummy:
			s.Parents = append(s.Parents, Parent{Name: x.name, Lower: below, VLAN: x.vlan, Down: !x.up, Narrow: below != "" && x.mtu != lower.vlanMTU()})
		case kindMacvlan, kindIPvlan:
			s.Children = append(s.Children, x.asChild(lower, addrs[x.index]))
		}
	}
	if s.Routes, err = l.ownedRoutes(ctx, list); err != nil {
		return s, err
	}
	for _, x := range list {
		if err := l.ownedEntries(ctx, x, tunnelled[x.index], &s); err != nil {
			return s, err
		}
	}
	return s, nil
}

// asChild describes a sub-interface; by its name it is one that stays.
func (l link) asChild(parent link, addrs []netip.Prefix) Child {
	c := Child{Name: l.name, Parent: parent.name, Kind: l.kind, Mode: nameOf(modes[l.kind], l.mode), MTU: l.mtu, MAC: l.mac,
		Stays: strings.HasPrefix(l.name, StaysPrefix)}
	if l.kind == kindIPvlan {
		c.Flag, c.MAC = nameOf(ipvlanFlags, l.flags), MAC{}
	}
	if c.Stays {
		c.Addrs, c.Down, c.Full = addrs, !l.up, l.mtu == parent.mtu
	}
	return c
}
