package driver

import (
	"cmp"
	"context"
)

// FirstMTU is the MTU that the network was made with.
func (n Network) FirstMTU() int { return cmp.Or(n.TunnelMTU, n.MTU) }

// Bears reports whether the network's protocols can live with an MTU in bytes.
func (n Network) Bears(mtu int) bool {
	n.MTU = mtu
	return checkMTU(n) == nil
}

// Shrink lowers the MTU of the network with the VNI, if one was not asked for, and
// reports what it was; 0 if it is not lowered. Containers that run keep theirs, as
// nobody but the engine can change it, and so does what is theirs on the host: the
// kernel tells them, where it can, what does not fit into the underlay.
func (d *Driver) Shrink(ctx context.Context, vni uint32, mtu int) (before int, err error) {
	n, unlock := d.spanning(vni)
	unlock()
	if n == nil {
		return 0, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	d.mu.Lock()
	rec, doomed := n.rec, n.doomed
	d.mu.Unlock()
	before = rec.MTU
	rec.TunnelMTU, rec.MTU = rec.FirstMTU(), mtu
	if doomed || rec.Options.MTU != 0 || mtu >= before || !rec.Bears(mtu) {
		return 0, nil
	}
	if err := d.saveNetwork(ctx, n, rec); err != nil {
		return 0, err
	}
	d.mu.Lock()
	s := d.networkState(n)
	d.mu.Unlock()
	_, err = d.kernel.Ensure(ctx, s)
	d.share(n)
	return before, err
}
