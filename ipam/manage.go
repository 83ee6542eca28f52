package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// Order is what somebody asks for by `weft address`.
type Order struct {
	Do string // release, forget or reserve
	// Pool and Space say which pool, where that is not clear from the address.
	Pool  netip.Prefix `json:",omitzero"`
	Space string       `json:",omitempty"`
	// Address is the address to release, or to reserve. forget takes a name, or
	// an address.
	Address netip.Addr `json:",omitzero"`
	Name    string     `json:",omitempty"`
	MAC     string     `json:",omitempty"`
	// Force releases an address although it is not known that nobody uses it.
	Force bool `json:",omitempty"`
	// Stranded releases all that no endpoint has, of the pool if there is one.
	Stranded bool `json:",omitempty"`
}

// Carry carries an order out and returns what was done, for people.
func (i *IPAM) Carry(ctx context.Context, o Order) (string, error) {
	if err := i.ready(); err != nil {
		return "", err
	}
	if o.Space != "" {
		if err := i.loadShared(ctx); err != nil {
			return "", err
		}
	}
	if o.Do == "release" && o.Stranded {
		return i.orderStranded(ctx, o)
	}
	do, ok := map[string]func(context.Context, *pool, Order) (string, error){
		"release": i.orderRelease, "forget": i.orderForget, "reserve": i.orderReserve,
	}[o.Do]
	if !ok {
		return "", fmt.Errorf("there is nothing like %q to do with an address: choose from release, forget, reserve", o.Do)
	}
	p, err := i.meant(o)
	if err != nil {
		return "", err
	}
	return do(ctx, p, o)
}

// meant finds the pool that an order is about.
func (i *IPAM) meant(o Order) (*pool, error) {
	i.mu.RLock()
	all := slices.Collect(maps.Values(i.pools))
	i.mu.RUnlock()
	var found []*pool
	for _, p := range all {
		if o.Pool.IsValid() && p.prefix != o.Pool.Masked() || o.Space != "" && p.space != spaceOption+o.Space ||
			o.Space == "" && (p.shared() || !p.named()) || o.Address.IsValid() && !p.prefix.Contains(o.Address) {
			continue
		}
		if !o.Address.IsValid() && !p.knows(o.Name) {
			continue
		}
		found = append(found, p)
	}
	what := "address " + o.Address.String()
	if !o.Address.IsValid() {
		what = "name " + o.Name
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fmt.Errorf("%s is in no pool of this host: see `weft status pools`, and give -space for one that hosts share", what)
	}
	var pools []string
	for _, p := range found {
		pools = append(pools, p.prefix.String())
	}
	slices.Sort(pools)
	return nil, fmt.Errorf("%s is in several pools (%s): say which with -pool", what, strings.Join(pools, ", "))
}

// knows reports whether anything is kept for a name.
func (p *pool) knows(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, reserved := p.reservation(name)
	return reserved || p.byName[name] != nil
}

// orderRelease frees an address that nobody gave back.
func (i *IPAM) orderRelease(ctx context.Context, p *pool, o Order) (string, error) {
	if !o.Address.IsValid() {
		return "", errors.New("say which address to release")
	}
	p.mu.Lock()
	taken, gateway := p.taken.has(o.Address), p.gateway(netip.Prefix{}) == o.Address || p.router(o.Address)
	other, foreign := p.others[o.Address]
	p.mu.Unlock()
	used, known := i.used(p.prefix)
	switch {
	case !taken:
		return "", fmt.Errorf("address %s of pool %s is not taken", o.Address, p.prefix)
	case gateway:
		return "", fmt.Errorf("address %s is the gateway of pool %s: it goes with the network", o.Address, p.prefix)
	case !foreign && known && used(o.Address) != "":
		return "", fmt.Errorf("address %s of pool %s is that of %s: disconnect its container instead", o.Address, p.prefix, used(o.Address))
	case foreign && !o.Force:
		return "", fmt.Errorf("address %s of pool %s %w: if that host will never come back, repeat with -force", o.Address, p.prefix, &heldError{other})
	case !foreign && !known && !o.Force:
		return "", fmt.Errorf("pool %s is that of another driver's network, whose containers are not known: if none has %s, repeat with -force", p.prefix, o.Address)
	}
	if foreign {
		if err := i.shared.evict(ctx, p.poolKey, o.Address, other); err != nil {
			return "", err
		}
		return fmt.Sprintf("address %s of pool %s is free; it was held by host %s", o.Address, p.prefix, other.Name), nil
	}
	if err := i.releaseAddress(ctx, poolID{poolKey: p.poolKey}, o.Address); err != nil {
		return "", err
	}
	return fmt.Sprintf("address %s of pool %s is free", o.Address, p.prefix), nil
}

// orderStranded frees all addresses that no endpoint has.
func (i *IPAM) orderStranded(ctx context.Context, o Order) (string, error) {
	i.mu.RLock()
	all := slices.Collect(maps.Values(i.pools))
	i.mu.RUnlock()
	var freed []netip.Addr
	for _, p := range all {
		if o.Pool.IsValid() && p.prefix != o.Pool.Masked() || o.Space != "" && p.space != spaceOption+o.Space || o.Address.IsValid() {
			continue
		}
		these, err := i.freeStranded(ctx, p, nil)
		freed = append(freed, these...)
		if err != nil && len(freed) > 0 {
			return "", fmt.Errorf("%w (%s before that)", err, freedText(freed))
		}
		if err != nil {
			return "", err
		}
	}
	if len(freed) == 0 {
		return "no address is stranded: each that was handed out more than ten minutes ago is in use", nil
	}
	return freedText(freed), nil
}

func freedText(freed []netip.Addr) string {
	slices.SortFunc(freed, netip.Addr.Compare)
	return fmt.Sprintf("free again: %s", strings.Trim(fmt.Sprint(freed), "[]"))
}

// freeStranded frees the addresses of a pool that no endpoint has, or the first one
// that may be chosen for a request, which does not wait for all. Nothing can use
// them: the engine makes an endpoint right after it got the address, or never; those
// of an engine that died it gives back when it starts, and what runs on meanwhile
// is in our own records. So not in our first minutes, nor for a swarm, whose tasks
// are not the engine's to give back.
func (i *IPAM) freeStranded(ctx context.Context, p *pool, r *addressRequest) (freed []netip.Addr, err error) {
	if id, held := i.holder(p.prefix); i.now().Sub(i.started) < strandedAfter || held && swarm(id) {
		return nil, nil
	}
	for _, a := range i.stranded(ctx, p) {
		if r != nil {
			if first, last := r.id.auto(); a.Less(first) || last.Less(a) || r.elsewhere(a) {
				continue
			}
		}
		b := p.freeing(a, i.now())
		if b == nil {
			continue
		}
		ctx, cancel := p.within(ctx)
		err := i.free(ctx, p, a, b)
		cancel()
		if err != nil {
			return freed, err
		}
		i.log.WithField("pool", p.prefix.String()).Infof("address %s, which no endpoint has, is free again", a)
		if freed = append(freed, a); r != nil {
			break
		}
	}
	return freed, nil
}

// freeing marks an address that was listed as stranded as busy, to be freed. It may
// have been freed meanwhile and be somebody's who has no endpoint yet: then not.
func (p *pool) freeing(a netip.Addr, now time.Time) *busy {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || !p.taken.has(a) || p.foreign(a) || p.busy[a] != nil || p.fresh(a, now) {
		return nil
	}
	b := &busy{done: make(chan struct{})}
	p.busy[a] = b
	return b
}

// fresh reports whether an address was granted only just now, by the clock that
// nobody sets; p.mu is held. Those that this process has not granted are as old as
// it is.
func (p *pool) fresh(a netip.Addr, now time.Time) bool {
	at, ok := p.granted[a]
	if c, mine := p.mine[a]; mine {
		at, ok = c.since, true
	}
	return ok && now.Sub(at) <= strandedAfter
}

// orderForget drops what is kept or reserved for a name. A container that has
// the address keeps it.
func (i *IPAM) orderForget(ctx context.Context, p *pool, o Order) (string, error) {
	p.mu.Lock()
	name := o.Name
	if b := p.byAddr[o.Address]; name == "" && b != nil {
		name = b.name
	}
	if name == "" {
		name = p.reservedFor[o.Address]
	}
	_, added := p.added[name]
	_, option := p.opts.reserved[name]
	b := p.byName[name]
	p.mu.Unlock()
	switch {
	case option:
		return "", fmt.Errorf("%s has an address of pool %s by the network's option reserve.%s: make the network again without it", name, p.prefix, name)
	case added:
		if err := i.putReserved(ctx, p, func(m map[string]reservation) error { delete(m, name); return nil }); err != nil {
			return "", err
		}
	case b != nil:
		if err := i.dropName(ctx, p, *b); err != nil {
			return "", err
		}
		p.mu.Lock()
		if p.byName[name] == b {
			p.unbind(b)
			p.woken(b.Address)
		}
		p.mu.Unlock()
	default:
		return "", fmt.Errorf("no name keeps address %s of pool %s", o.Address, p.prefix)
	}
	return fmt.Sprintf("nothing is kept for %s in pool %s", name, p.prefix), nil
}

// orderReserve keeps an address for a name from now on.
func (i *IPAM) orderReserve(ctx context.Context, p *pool, o Order) (string, error) {
	value := o.Address.String()
	if o.MAC != "" {
		value += "," + o.MAC
	}
	r, err := parseReservation(o.Name, value, p.prefix)
	if err != nil {
		return "", fmt.Errorf("reserve %s for %s: %w", value, o.Name, err)
	}
	if !p.named() {
		return "", fmt.Errorf("pool %s is handed out by the leader of a swarm, who is told no names: an address of it cannot be reserved", p.prefix)
	}
	holder := ""
	if used, known := i.used(p.prefix); known {
		holder = used(r.addr)
	}
	if host, ok := (addressRequest{far: i.far(p.prefix)}).holder(r.addr); ok {
		return "", fmt.Errorf("address %s of pool %s is held by host %s: choose another, or remove that container first", r.addr, p.prefix, host)
	}
	endpoint := strings.HasPrefix(holder, "endpoint ")
	err = i.putReserved(ctx, p, func(m map[string]reservation) error {
		owner, option := p.reservedFor[r.addr], p.opts.reserved[o.Name].addr
		for name, have := range m { // may be newer
			if have.addr == r.addr {
				owner = name
			}
		}
		b := p.byAddr[r.addr]
		other, foreign := p.others[r.addr]
		switch {
		case foreign && (b == nil || b.name != o.Name):
			return fmt.Errorf("address %s of pool %s %w: choose another, or remove that container first", r.addr, p.prefix, &heldError{other})
		case p.gateway(netip.Prefix{}) == r.addr, p.router(r.addr), holder != "" && !endpoint:
			return fmt.Errorf("address %s of pool %s is %s of its network: choose another", r.addr, p.prefix, cmp.Or(holder, "the gateway"))
		case option.IsValid():
			return fmt.Errorf("%s has %s by the network's option reserve.%s: make the network again to change it", o.Name, option, o.Name)
		case owner != "" && owner != o.Name:
			return fmt.Errorf("address %s of pool %s is reserved for %s: `weft address forget %s` first", r.addr, p.prefix, owner, owner)
		case p.taken.has(r.addr) && b != nil && b.name != o.Name && !strings.HasPrefix(b.name, fixedPrefix):
			return fmt.Errorf("address %s of pool %s is in use by %s: remove that container first", r.addr, p.prefix, b.name)
		}
		m[o.Name] = r
		return nil
	})
	if err != nil {
		return "", err
	}
	done := fmt.Sprintf("address %s of pool %s is reserved for %s", r, p.prefix, o.Name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if b := p.byAddr[r.addr]; p.taken.has(r.addr) && (b == nil || b.name != o.Name) {
		done += fmt.Sprintf("; %s has it now: if that is another container, remove it (docker network inspect shows which it is)", cmp.Or(holder, "a container"))
	}
	return done, nil
}

// putReserved changes what was reserved by command: record, then memory. change is
// called with changes and p.mu held; in a shared space it may be more than once.
func (i *IPAM) putReserved(ctx context.Context, p *pool, change func(map[string]reservation) error) error {
	release, err := i.change(ctx)
	if err != nil {
		return err
	}
	defer release()
	if p.shared() {
		return i.shareReserved(ctx, p, change)
	}
	p.mu.Lock()
	next := p.draft(p.parts)
	next.added = map[string]reservation{}
	maps.Copy(next.added, p.added)
	if err = errPoolGone; !p.closed {
		err = change(next.added)
	}
	p.mu.Unlock()
	if err != nil {
		return err
	}
	err = i.home(p.poolKey).putPool(ctx, next, store.Batch{})
	p.mu.Lock()
	p.rev = next.rev
	if err != nil {
		p.rev = 0
		p.mu.Unlock()
		return err
	}
	p.added = next.added
	lost := p.reserve()
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)
	return nil
}

// ForgetPool drops the pools of this host with a subnet, and all their addresses:
// their network was forgotten, and the engine will not release them. Other networks
// may have that subnet, as several on LANs may; others are the links that they are on,
// "" for none. A pool that may be one of theirs stays, and stays is true: of two on one
// link nobody says which network has which. What cannot be dropped now Run drops, as a
// second order would find no network.
func (i *IPAM) ForgetPool(ctx context.Context, prefix netip.Prefix, others []string) (stays bool, err error) {
	if err := i.ready(); err != nil {
		return false, err
	}
	used, _ := i.used(prefix)
	i.mu.RLock()
	var list []*pool
	for k, p := range i.pools {
		if k.prefix != prefix || p.shared() || k.space == GlobalSpace {
			continue
		}
		p.mu.Lock()
		keep := len(others) > 0 && (k.dhcp() == "" || slices.Contains(others, k.dhcp()) || p.serves(used))
		// One that is not used from now on is for the next network with the subnet.
		p.releasing = p.releasing || !keep
		p.idleParts()
		p.mu.Unlock()
		if stays = stays || keep; !keep {
			list = append(list, p)
		}
	}
	i.mu.RUnlock()
	if len(list) == 0 {
		return stays, nil
	}
	release, err := i.change(ctx)
	if err == nil {
		defer release()
	}
	for _, p := range list {
		if err == nil {
			err = i.drop(ctx, p)
		}
		if err != nil {
			i.later(cleanup{pool: p})
		}
	}
	return stays, err
}

// serves reports whether a network uses a leased address of the pool; p.mu is held.
func (p *pool) serves(used func(netip.Addr) string) bool {
	for a := range p.leased {
		if used != nil && used(a) != "" {
			return true
		}
	}
	return false
}

// strandedAfter is how long an address may be granted without an endpoint that
// has it: the engine makes the endpoint right after it got the address.
const strandedAfter = 10 * time.Minute

// Station returns the MAC address that goes with an address of a pool of this
// host, where there is one.
func (i *IPAM) Station(prefix netip.Prefix, a netip.Addr) (MAC, bool) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	for k, p := range i.pools {
		if k.prefix != prefix || !k.named() {
			continue
		}
		if mac, ok := p.station(a); ok {
			return mac, true
		}
	}
	return MAC{}, false
}

// Chosen reports whether nobody typed the subnet of a pool of this host, or the
// gateway: then they are ours, or the engine's. ours is false where the pool is not
// one of ours, and nothing is known.
func (i *IPAM) Chosen(prefix netip.Prefix, gateway netip.Addr) (subnet, address, ours bool) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	for k, p := range i.pools {
		if k.prefix != prefix || k.space == GlobalSpace {
			continue
		}
		p.mu.Lock()
		subnet, address, ours = subnet || p.automatic, address || gateway.IsValid() && p.guess == gateway, true
		p.mu.Unlock()
	}
	return subnet, address, ours
}

// Range returns what this host alone chooses addresses of a subnet from: the
// --ip-range, or all of it. ok is false where another IPAM, a DHCP server or a shared
// space has the subnet, or several networks share it.
func (i *IPAM) Range(prefix netip.Prefix) (r netip.Prefix, ok bool) {
	p := i.pool(poolKey{LocalSpace, prefix})
	if p == nil {
		return r, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.parts) != 1 {
		return r, false
	}
	if sub := p.parts[0].sub; sub.IsValid() {
		return sub, true
	}
	return prefix, true
}

// station is the MAC address of a taken address: that of its lease, or what is
// reserved.
func (p *pool) station(a netip.Addr) (MAC, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.taken.has(a) {
		return MAC{}, false
	}
	if p.foreign(a) {
		return MAC{}, false
	}
	if l := p.leased[a]; l != nil {
		return l.Station.MAC, true
	}
	r, _ := p.reservation(p.reservedFor[a])
	return r.mac, r.mac != MAC{}
}
