package datapath

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// settleTime bounds the wait for the kernel to clean a namespace up: some tens of
// milliseconds, more where many go at once.
const settleTime = 5 * time.Second

// Settle waits until no other macvlan on the same parent has the hardware address
// of this one. One in a namespace that goes away keeps it until the kernel has
// cleaned up there, which nobody is told of, and whoever sets the new one up before
// is refused. The link is down afterwards, as before.
func (k *Kernel) Settle(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	l, err := k.links.change.get(name)
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for {
		err := k.links.change.switched(l.index, true)
		if err == nil {
			return k.links.change.switched(l.index, false)
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return fmt.Errorf("set %s up: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("hardware address %s is still that of a container that is being removed: try again", l.mac)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Present reports whether the host has a link of that name.
func (k *Kernel) Present(name string) (bool, error) {
	_, err := k.links.change.get(name)
	if errors.Is(err, ErrAbsent) {
		return false, nil
	}
	return err == nil, err
}

// switched sets the link up or down.
func (c *rtnl) switched(index int, up bool) error {
	info := linkInfo(index, up)
	info.Change = unix.IFF_UP
	req := c.request(unix.RTM_NEWLINK, unix.NLM_F_ACK, info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}
