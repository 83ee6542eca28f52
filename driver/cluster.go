package driver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// ModeOverlay is the value of -o mode= whose networks span hosts. Its Backend is
// not in this package.
const ModeOverlay = "overlay"

// cluster is what the driver needs of the other hosts, for networks with a VNI.
// None of it waits for another host but Admit.
type cluster interface {
	admission
	exchange
}

// admission is asked before something is made.
type admission interface {
	// Admit fills in VNI, Port, Underlay and MTU of a network that is about to
	// be made, and refuses one that contradicts what other hosts have. It takes
	// at most 2 s.
	Admit(ctx context.Context, n *Network) error
	// Claim is later than all claims that this host knows of.
	Claim() uint64
	// Holder names the other host that has the address, if one has and is heard.
	Holder(n Network, a netip.Addr) (host string, ok bool)
}

// exchange is told what this host has, and asked for what the others have.
type exchange interface {
	// Publish says which endpoints this host has of a network.
	Publish(n Network, endpoints []Endpoint)
	// Withdraw says that this host no longer has the network.
	Withdraw(n Network)
	// Remote is what leads to the endpoints of the other hosts.
	Remote(n Network) datapath.State
	// Strangers says whether containers of this host are on a network that no record
	// names.
	Strangers(vni uint32, there bool)
}

// admit asks the cluster about a network that is not there yet.
func (d *Driver) admit(ctx context.Context, n *Network) error {
	// Who is there is not a setting of the network: the next leader of a swarm
	// says it in another way.
	defer func() { n.Options.Join = "" }()
	d.mu.Lock()
	old := d.networks[n.ID]
	if old == nil || old.doomed {
		d.mu.Unlock()
		for i, s := range n.Subnets {
			if d.ranges == nil || isSwarm(n.ID) { // a swarm's addresses are chosen by its leader
				break
			}
			if r, ok := d.ranges(s.Pool); ok {
				n.Subnets[i].Range = r
			}
		}
		return d.cluster.Admit(ctx, n)
	}
	defer d.mu.Unlock()
	for i := range min(len(n.Subnets), len(old.rec.Subnets)) {
		n.Subnets[i].Range = old.rec.Subnets[i].Range
	}
	n.VNI, n.Port, n.Underlay, n.TunnelMTU = old.rec.VNI, old.rec.Port, old.rec.Underlay, old.rec.TunnelMTU
	if n.Options.MTU == 0 {
		n.MTU = old.rec.MTU
	}
	return nil
}

// unclaimed refuses an address that a container on another host has. Swarm gives
// an address to the next task before the node of the last has let go of it: its
// networks let the later claim win.
func (d *Driver) unclaimed(n Network, e Endpoint) error {
	if n.VNI == 0 || isSwarm(n.ID) {
		return nil
	}
	for _, a := range e.Addrs {
		if host, ok := d.cluster.Holder(n, a.Addr()); ok {
			return heldOn(host, a.Addr())
		}
	}
	return nil
}

func heldOn(host string, a netip.Addr) error {
	return fmt.Errorf("address %s is in use on host %s: stop that container, or give this one another address", a, host)
}

// isSwarm tells a network of a swarm by its ID: those of one engine are 64 hex
// digits, a swarm's 25 in base 36.
func isSwarm(networkID string) bool { return len(networkID) < 64 || !isHex(networkID) }

// share tells the other hosts what this one has of a network.
func (d *Driver) share(n *network) {
	if n.rec.VNI == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if n.doomed {
		return
	}
	var list []Endpoint
	for _, e := range n.endpoints {
		if e.holds() {
			list = append(list, e.rec)
		}
	}
	d.cluster.Publish(n.rec, list)
}

// shareAll is what a start tells the others; what was known of them, whether or
// not they can be reached now, is wanted from the first pass on.
func (d *Driver) shareAll() {
	d.mu.Lock()
	list := make([]*network, 0, len(d.networks))
	for _, n := range d.networks {
		if n.rec.VNI != 0 && !n.doomed {
			list = append(list, n)
		}
	}
	d.mu.Unlock()
	for _, n := range list {
		d.share(n)
		remote := d.cluster.Remote(n.rec)
		d.mu.Lock()
		n.remote = remote
		d.mu.Unlock()
	}
}

// spanning returns the network with the VNI, or nil, as find does.
func (d *Driver) spanning(vni uint32) (n *network, unlock func()) {
	d.mu.Lock()
	id := ""
	for _, n := range d.networks {
		if n.rec.VNI == vni && !n.doomed {
			id = n.rec.ID
		}
	}
	d.mu.Unlock()
	return d.find(id)
}

// Follow makes the kernel equal to what the other hosts have of a network now.
// Nobody else calls it at the same time. What fails is done by the next pass.
func (d *Driver) Follow(ctx context.Context, vni uint32) error {
	n, unlock := d.spanning(vni)
	defer unlock()
	if n == nil {
		return nil
	}
	want := d.cluster.Remote(n.rec)
	d.mu.Lock()
	have := n.remote
	n.remote = want
	keep := want
	keep.Elements = slices.Concat(want.Elements, d.membersLocked(n), d.commonLocked(have).Elements)
	d.mu.Unlock()
	if add := want.Minus(have); !add.Empty() {
		if _, err := d.kernel.Ensure(ctx, add); err != nil {
			return fmt.Errorf("network %s: what leads to other hosts: %w", short(n.rec.ID), err)
		}
	}
	if drop := without(have, keep); !drop.Empty() {
		if err := d.kernel.Remove(ctx, drop); err != nil {
			return fmt.Errorf("network %s: what led to other hosts: %w", short(n.rec.ID), err)
		}
	}
	return nil
}

// membersLocked are the elements that other networks want on account of other
// hosts: several may have the same. d.mu is held.
func (d *Driver) membersLocked(except *network) (list []datapath.Element) {
	for _, o := range d.networks {
		if o != except && !o.doomed {
			list = append(list, o.remote.Elements...)
		}
	}
	return list
}

// wantedMeanwhile makes elements again that went with a network and that another has
// come to want since they were found to be nobody else's.
func (d *Driver) wantedMeanwhile(ctx context.Context, gone *network, dropped datapath.State) error {
	d.mu.Lock()
	wanted := d.membersLocked(gone)
	d.mu.Unlock()
	again := datapath.State{Elements: filter(wanted, func(e datapath.Element) bool { return slices.Contains(dropped.Elements, e) })}
	if again.Empty() {
		return nil
	}
	_, err := d.kernel.Ensure(ctx, again)
	return err
}

// Rehome moves the tunnels of all networks to another address of this host.
func (d *Driver) Rehome(ctx context.Context, underlay netip.Addr) (err error) {
	d.mu.Lock()
	var ids []string
	for id, n := range d.networks {
		if n.rec.VNI != 0 && n.rec.Underlay != underlay {
			ids = append(ids, id)
		}
	}
	d.mu.Unlock()
	for _, id := range ids {
		err = join(err, d.rehome(ctx, id, underlay))
	}
	return err
}

func (d *Driver) rehome(ctx context.Context, id string, underlay netip.Addr) error {
	d.mu.Lock()
	n := d.networks[id]
	d.mu.Unlock()
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.doomed { // a deletion holds the lock while it sets this
		return nil
	}
	rec := n.rec
	rec.Underlay = underlay
	if err := d.saveNetwork(ctx, n, rec); err != nil {
		return err
	}
	d.mu.Lock()
	s := d.networkState(n)
	s.Add(n.remote)
	d.mu.Unlock()
	_, err := d.kernel.Ensure(ctx, s)
	d.share(n)
	return err
}
