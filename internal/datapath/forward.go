package datapath

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// entry is a Forward or a Neighbour.
type entry[T any] interface {
	comparable
	fmt.Stringer
	link() string
	Key() T
	neigh(index int) neigh
	replace() int // flags of the message that sets it, whatever was there
}

func (f Forward) link() string { return f.Link }

// Key is what identifies the entry in the kernel: not the VTEP, which can be
// replaced, except of a flood entry.
func (f Forward) Key() Forward {
	if f.MAC == (MAC{}) {
		return Forward{Link: f.Link, VTEP: f.VTEP}
	}
	return Forward{Link: f.Link, MAC: f.MAC}
}

// ntfSticky is NTF_STICKY of linux/neighbour.h, since Linux 4.20.
const ntfSticky = 1 << 6

// neigh is both entries in one message, of which the kernel serves the bridge's
// first. NUD_NOARP is what the bridge calls static, where
// NUD_PERMANENT would be an address of this host; the device wants to see one of
// NUD_PERMANENT and NUD_REACHABLE, and lets no entry with NUD_NOARP age. Only
// one that is sticky stays where it is when a port sends with its MAC: a container
// here may have the same.
func (f Forward) neigh(index int) neigh {
	n := neigh{family: unix.AF_BRIDGE, index: index, mac: f.MAC, dst: f.VTEP,
		state: unix.NUD_NOARP | unix.NUD_REACHABLE, flags: unix.NTF_SELF | unix.NTF_MASTER | ntfSticky}
	if f.MAC == (MAC{}) {
		n.state, n.flags = unix.NUD_PERMANENT, unix.NTF_SELF
	}
	return n
}

// replace appends a flood entry: the zero MAC has many, which a replacement
// would be one of (the kernel refuses it).
func (f Forward) replace() int {
	if f.MAC == (MAC{}) {
		return unix.NLM_F_CREATE | unix.NLM_F_APPEND
	}
	return unix.NLM_F_CREATE | unix.NLM_F_REPLACE
}

// Key is what identifies the entry in the kernel: not the MAC, which can be
// replaced.
func (n Neighbour) Key() Neighbour { return Neighbour{Link: n.Link, Addr: n.Addr} }

func (n Neighbour) link() string { return n.Link }
func (n Neighbour) replace() int { return unix.NLM_F_CREATE | unix.NLM_F_REPLACE }

// neigh is permanent, which also keeps it out of the count that the kernel
// limits (gc_thresh3, 1024 by default).
func (n Neighbour) neigh(index int) neigh {
	family := byte(unix.AF_INET6)
	if n.Addr.Is4() {
		family = unix.AF_INET
	}
	return neigh{family: family, index: index, state: unix.NUD_PERMANENT, mac: n.MAC, dst: n.Addr}
}

func requests[T any](list []T, f func(T) *nl.NetlinkRequest) []*nl.NetlinkRequest {
	out := make([]*nl.NetlinkRequest, len(list))
	for i, x := range list {
		out[i] = f(x)
	}
	return out
}

// byLink parts a list into one for each link, in the order of their appearance.
func byLink[T entry[T]](list []T) [][]T {
	place := make(map[string]int)
	var out [][]T
	for _, x := range list {
		i, ok := place[x.link()]
		if !ok {
			i = len(out)
			place[x.link()] = i
			out = append(out, nil)
		}
		out[i] = append(out[i], x)
	}
	return out
}

func (l *links) ensureForwards(ctx context.Context, all []Forward, d *done) error {
	for _, list := range byLink(all) {
		made, mended, err := ensureEntries(ctx, l, list, l.forwardsOf)
		d.made.Forwards = append(d.made.Forwards, made...)
		if err != nil {
			return err
		}
		if n := len(made) + mended; n > 0 {
			d.say("vxlan %s: %d forwarding entries", list[0].Link, n)
		}
	}
	return nil
}

func (l *links) ensureNeighbours(ctx context.Context, all []Neighbour, d *done) error {
	for _, list := range byLink(all) {
		made, mended, err := ensureEntries(ctx, l, list, l.neighboursOf)
		d.made.Neighbours = append(d.made.Neighbours, made...)
		if err != nil {
			return err
		}
		if n := len(made) + mended; n > 0 {
			d.say("bridge %s: %d neighbours", list[0].Link, n)
		}
	}
	return nil
}

// ensureEntries makes or mends entries of one link. Where all are new, as those
// of a container that starts somewhere are, no table is read; it is once where
// the kernel has one already, which may be another one. Flood entries are all
// one entry in that respect.
//
// What was made is returned with an error too, for it is to be undone. What was
// mended stays mended: what it was before is not kept.
func ensureEntries[T entry[T]](ctx context.Context, l *links, list []T, read func(context.Context, link) ([]T, error)) (made []T, mended int, err error) {
	name := list[0].link()
	index, err := l.index(name)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %s %w", list[0], name, err)
	}
	made, err = setEntries(ctx, l, list, func(x T) *nl.NetlinkRequest {
		n := x.neigh(index)
		n.flags &^= unix.NTF_MASTER | ntfSticky
		return n.request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	})
	if err != nil {
		return made, 0, err
	}
	// Only now the bridge's entry: it may have learned the MAC on a local port,
	// from a container that was here before.
	ported := filter(made, func(x T) bool { return x.neigh(index).flags&unix.NTF_MASTER != 0 })
	_, err = setEntries(ctx, l, ported, func(x T) *nl.NetlinkRequest {
		n := x.neigh(index)
		n.flags = unix.NTF_MASTER | ntfSticky
		return n.request(unix.RTM_NEWNEIGH, x.replace())
	})
	if err != nil || len(made) == len(list) {
		return made, 0, err
	}
	own, err := l.change.get(name)
	if err != nil {
		return made, 0, fmt.Errorf("%s: %s %w", list[0], name, err)
	}
	have, err := read(ctx, own)
	if err != nil {
		return made, 0, err
	}
	is, known := make(map[T]bool, len(have)), make(map[T]bool, len(have))
	for _, x := range have {
		is[x], known[x.Key()] = true, true
	}
	set, err := setEntries(ctx, l, filter(list, func(x T) bool { return !is[x] }), func(x T) *nl.NetlinkRequest {
		return x.neigh(index).request(unix.RTM_NEWNEIGH, x.replace())
	})
	for _, x := range set {
		if known[x.Key()] {
			mended++
		} else {
			made = append(made, x)
		}
	}
	return made, mended, err
}

// setEntries sends a message about each entry and returns those that the kernel
// took. It is no error that one is there already.
func setEntries[T entry[T]](ctx context.Context, l *links, list []T, message func(T) *nl.NetlinkRequest) (set []T, err error) {
	answers, err := l.change.serve(ctx, requests(list, message))
	for i, a := range answers {
		switch {
		case a == nil:
			set = append(set, list[i])
		case err == nil && !errors.Is(a, unix.EEXIST):
			err = fmt.Errorf("%s: %w", list[i], a)
		}
	}
	return set, err
}

func filter[T any](list []T, keep func(T) bool) []T {
	var out []T
	for _, x := range list {
		if keep(x) {
			out = append(out, x)
		}
	}
	return out
}

// absent reports whether a deletion was refused because there is nothing to
// delete: no such entry, no such link any more, or a device that is no port.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP)
}

// removeForwards removes the forwarding entries that do not go with their device.
func (l *links) removeForwards(ctx context.Context, s State) error {
	going := make(map[string]bool, len(s.VXLANs))
	for _, v := range s.VXLANs {
		going[v.Name] = true
	}
	var errs []error
	for _, list := range byLink(s.Forwards) {
		if !going[list[0].Link] {
			errs = append(errs, l.removeForwardsOf(ctx, list))
		}
	}
	return errors.Join(errs...)
}

// removeForwardsOf removes entries of the device first. The bridge's does not
// say which VTEP it is for: it goes where the device has none left for the MAC.
// That has to be asked: a deletion with another VTEP changes nothing and is a
// success all the same.
func (l *links) removeForwardsOf(ctx context.Context, list []Forward) error {
	name := list[0].Link
	index, err := l.index(name)
	if errors.Is(err, ErrAbsent) {
		return nil
	}
	if err != nil {
		return err
	}
	about := func(f Forward, flags byte) neigh {
		return neigh{family: unix.AF_BRIDGE, index: index, mac: f.MAC, flags: flags}
	}
	// One without a VTEP was found in the bridge alone.
	own := filter(list, func(f Forward) bool { return f.VTEP.IsValid() })
	err = l.dropEntries(ctx, requests(own, func(f Forward) *nl.NetlinkRequest {
		n := about(f, unix.NTF_SELF)
		n.dst = f.VTEP
		return n.request(unix.RTM_DELNEIGH, 0)
	}))
	list = filter(list, func(f Forward) bool { return f.MAC != (MAC{}) })
	answers, e := l.change.serve(ctx, requests(list, func(f Forward) *nl.NetlinkRequest {
		return about(f, unix.NTF_SELF).request(unix.RTM_GETNEIGH, 0)
	}))
	var free []Forward
	for i, a := range answers {
		if absent(a) {
			free = append(free, list[i])
		}
	}
	err = errors.Join(err, e, l.dropEntries(ctx, requests(free, func(f Forward) *nl.NetlinkRequest {
		return about(f, unix.NTF_MASTER).request(unix.RTM_DELNEIGH, 0)
	})))
	if err != nil {
		return fmt.Errorf("remove forwarding entries of %s: %w", name, err)
	}
	return nil
}

// dropEntries sends deletions. What is absent is success.
func (l *links) dropEntries(ctx context.Context, reqs []*nl.NetlinkRequest) error {
	answers, err := l.change.serve(ctx, reqs)
	for _, a := range answers {
		if err == nil && a != nil && !absent(a) {
			err = a
		}
	}
	return err
}

// removeNeighbours removes the neighbour entries that do not go with their bridge.
func (l *links) removeNeighbours(ctx context.Context, s State) error {
	going := make(map[string]bool, len(s.Bridges))
	for _, b := range s.Bridges {
		going[b.Name] = !b.Existing
	}
	var errs []error
	for _, list := range byLink(s.Neighbours) {
		if going[list[0].Link] {
			continue
		}
		index, err := l.index(list[0].Link)
		if errors.Is(err, ErrAbsent) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := l.dropEntries(ctx, requests(list, func(n Neighbour) *nl.NetlinkRequest {
			return n.neigh(index).request(unix.RTM_DELNEIGH, 0)
		})); err != nil {
			errs = append(errs, fmt.Errorf("remove neighbours on %s: %w", list[0].Link, err))
		}
	}
	return errors.Join(errs...)
}

// ownedEntries adds to s what leads to other hosts by a link of ours.
func (l *links) ownedEntries(ctx context.Context, x link, tunnelled bool, s *State) error {
	switch {
	case !x.ours():
	case x.kind == kindVXLAN:
		list, err := l.forwardsOf(ctx, x)
		if err != nil {
			return err
		}
		s.Forwards = append(s.Forwards, list...)
	case tunnelled:
		list, err := l.neighboursOf(ctx, x)
		if err != nil {
			return err
		}
		s.Neighbours = append(s.Neighbours, list...)
	}
	return nil
}

// forwardsOf lists the forwarding entries of a VXLAN device, and those of its
// bridge that have none of the device, with a zero VTEP.
func (l *links) forwardsOf(ctx context.Context, x link) ([]Forward, error) {
	list, err := dump(ctx, func() ([]neigh, error) { return l.dumps.forwarding(x.index) })
	if err != nil {
		return nil, fmt.Errorf("list forwarding entries of %s: %w", x.name, err)
	}
	static, paired := make(map[MAC]bool), make(map[MAC]bool)
	for _, n := range list {
		if n.master && !n.vlan { // the bridge repeats an entry for every VLAN of its port
			static[n.mac] = n.state == unix.NUD_NOARP
		}
	}
	var out []Forward
	for _, n := range list {
		if n.master {
			continue
		}
		f := Forward{Link: x.name, MAC: n.mac, VTEP: n.dst, Altered: n.state&(unix.NUD_NOARP|unix.NUD_PERMANENT) == 0}
		if f.MAC != (MAC{}) {
			f.Altered = f.Altered || !static[f.MAC]
			paired[f.MAC] = true
		}
		out = append(out, f)
	}
	for _, n := range list {
		// The one for the device's own address is the kernel's.
		if n.master && !n.vlan && !paired[n.mac] && n.mac != x.mac {
			out = append(out, Forward{Link: x.name, MAC: n.mac, Altered: true})
		}
	}
	return out, nil
}

// neighboursOf lists the permanent neighbour entries of a bridge.
func (l *links) neighboursOf(ctx context.Context, x link) ([]Neighbour, error) {
	list, err := dump(ctx, func() ([]neigh, error) { return l.dumps.entries(x.index) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours on %s: %w", x.name, err)
	}
	var out []Neighbour
	for _, n := range list {
		if n.state&unix.NUD_PERMANENT != 0 && n.dst.IsValid() {
			out = append(out, Neighbour{Link: x.name, Addr: n.dst, MAC: n.mac})
		}
	}
	return out, nil
}
