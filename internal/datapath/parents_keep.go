package datapath

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// goneTime bounds the wait for the sub-interfaces of containers that have just
// ended: the kernel cleans their namespaces up later, and tells nobody.
const goneTime = 2 * time.Second

// removeVLAN deletes a VLAN sub-interface of ours, or lets go of it where others have
// sub-interfaces on it, which would go with it: another instance's or the engine's
// containers. It is the host's then, as if it had been there before us.
func (l *links) removeVLAN(ctx context.Context, name string) (kept bool, err error) {
	have, err := l.change.get(name)
	if errors.Is(err, ErrAbsent) {
		return false, nil
	}
	if err != nil || have.own(kindVLAN) != nil { // gone, or not ours
		return false, err
	}
	for stop := time.Now().Add(goneTime); ; {
		used, err := l.carries(ctx, have.index)
		if err != nil {
			return false, fmt.Errorf("remove %s %s: %w", kindVLAN, name, err)
		}
		if !used {
			return false, l.removeOne(ctx, doomed{name, kindVLAN})
		}
		if time.Now().After(stop) {
			break
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("remove %s %s: %w", kindVLAN, name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Index = have.index
	if err := l.lib.LinkSetGroup(&netlink.Device{LinkAttrs: attrs}, 0); err != nil {
		return false, fmt.Errorf("let go of %s %s: %w", kindVLAN, name, err)
	}
	return true, nil
}

// carries reports whether anything hangs on a link. What was moved to a container no
// list shows. The kernel knows: one macvlan of mode passthru has to be alone on its
// parent. Made and not set up, it changes nothing there.
func (l *links) carries(ctx context.Context, index int) (bool, error) {
	all, err := l.list(ctx)
	if err != nil {
		return false, fmt.Errorf("list links: %w", err)
	}
	for _, x := range all {
		if x.kind == kindVLAN && x.peer == index && !x.away {
			return true, nil
		}
	}
	trial := link{name: fmt.Sprintf("wft%d", index), kind: kindMacvlan, peer: index, mode: modes[kindMacvlan]["passthru"]}
	err = l.change.create(trial, nl.NewRtAttr(nl.IFLA_MACVLAN_MODE, nl.Uint32Attr(uint32(trial.mode))))
	switch {
	case err == nil, errors.Is(err, unix.EEXIST): // left of a trial that was interrupted
		return false, l.removeOne(ctx, doomed{trial.name, kindMacvlan})
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBUSY): // macvlan; ipvlan, a bridge, a bond
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP): // nor is there any macvlan on it
		return false, nil
	}
	return false, err
}
