package overlay

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
)

// Containers on all hosts need one MTU, which every underlay between them carries. A
// network that was given none takes the least that is known when it is made, and
// follows when less is learnt later: of a host that was not heard then, or of an
// underlay that was changed. It does not grow again by itself: whoever is silent may
// still need it.

// fitTime is for how long an underlay has one MTU before networks follow it: while a
// host starts its cards may have another for some seconds, and what is lowered stays
// low, on all hosts.
const fitTime = time.Minute

// fitUnderlay lowers the MTU of networks to what the underlay carries. One that was
// asked for stays, as one does whose protocols need more, and is told of.
func (c *Cluster) fitUnderlay(ctx context.Context, f follower, u datapath.Underlay, now time.Time) {
	most := u.MTU - overhead(u.Addr)
	c.mu.Lock()
	if c.most != most {
		c.most, c.mostSince = most, now
	}
	if now.Sub(c.mostSince) < fitTime {
		c.mu.Unlock()
		return
	}
	var list []driver.Network
	for _, n := range c.networks {
		if n.rec.MTU > most {
			list = append(list, n.rec)
		}
	}
	before := c.tight
	c.tight = nil
	var lower []driver.Network
	for _, n := range list {
		if n.Options.MTU == 0 && n.Bears(most) {
			lower = append(lower, n)
			continue
		}
		t := Trouble{Peer: fmt.Sprintf("network with VNI %d", n.VNI), Since: now.UTC(), Reason: fmt.Sprintf(
			"mtu %d does not fit into the underlay any more: %s carries %d and the tunnel adds %d, at most %d", n.MTU, u.Link, u.MTU, overhead(u.Addr), most)}
		if i := slices.IndexFunc(before, func(o Trouble) bool { return o.Peer == t.Peer }); i >= 0 {
			t.Since = before[i].Since
		} else {
			c.c.Log.Warnf("%s: %s", t.Peer, t.Reason)
		}
		c.tight = append(c.tight, t)
	}
	slices.SortFunc(c.tight, func(a, b Trouble) int { return cmp.Compare(a.Peer, b.Peer) })
	c.mu.Unlock()
	for _, n := range lower {
		c.shrink(ctx, f, n, most, fmt.Sprintf("%s carries %d", u.Link, u.MTU))
	}
}

// fitOthers lowers the MTU of a network to that of the hosts that have it.
func (c *Cluster) fitOthers(ctx context.Context, f follower, vni uint32) {
	c.mu.Lock()
	n := c.networks[vni]
	var rec driver.Network
	if n != nil {
		rec = n.rec
	}
	c.mu.Unlock()
	least, host := c.table.leastMTU(vni)
	if n == nil || least == 0 || least >= rec.MTU {
		return
	}
	c.shrink(ctx, f, rec, least, fmt.Sprintf("host %s has it with that", host))
}

func (c *Cluster) shrink(ctx context.Context, f follower, n driver.Network, mtu int, why string) {
	before, err := f.Shrink(ctx, n.VNI, mtu)
	switch {
	case err != nil && ctx.Err() == nil:
		c.c.Log.WithField("vni", n.VNI).WithError(err).Warn("the MTU of the network is not lowered")
	case err == nil && before != 0:
		c.c.Log.WithField("vni", n.VNI).Warnf("the MTU is now %d, and was %d: %s. Containers that run keep theirs until they are started again", mtu, before, why)
	}
}

// leastMTU is the least that a host which was heard has a network with, and its name; 0
// if there is none.
func (t *Table) leastMTU(vni uint32) (mtu int, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	own := t.own[vni].part
	for _, h := range t.hosts {
		p, ok := h.parts[vni]
		if !ok || p.Gone || !h.heard || p.MTU == 0 || !slices.Equal(p.Subnets, own.Subnets) {
			continue
		}
		if mtu == 0 || p.MTU < mtu {
			mtu, name = p.MTU, h.name
		}
	}
	return mtu, name
}
