package ipam

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/internal/store"
)

// leaser asks the DHCP servers of a LAN.
type leaser interface {
	Offer(ctx context.Context, link string, s dhcp.Station) (dhcp.Lease, error)
	Acquire(ctx context.Context, link string, s dhcp.Station, want netip.Addr, within netip.Prefix) (dhcp.Lease, error)
	Extend(ctx context.Context, link string, s dhcp.Station, l dhcp.Lease) (dhcp.Lease, error)
}

// lessee tells them what is not needed.
type lessee interface {
	Release(ctx context.Context, link string, s dhcp.Station, l dhcp.Lease) error
	Decline(ctx context.Context, link string, s dhcp.Station, l dhcp.Lease) error
}

// dhcpSpace is how the space of a pool begins whose addresses are leased on the
// link that follows. A second pool of the same subnet has a number after a
// colon, which no link's name has.
const dhcpSpace = "dhcp="

// dhcp returns the link of a pool whose addresses are leased, "" for others.
func (k poolKey) dhcp() string {
	link, ok := strings.CutPrefix(k.space, dhcpSpace)
	if !ok {
		return ""
	}
	link, _, _ = strings.Cut(link, ":")
	return link
}

// checkLink takes what the kernel takes for the name of a link (dev_valid_name),
// without what would not fit into a pool ID.
func checkLink(name string) error {
	if name == "" || len(name) > 15 || name == "." || name == ".." || strings.ContainsAny(name, "/:, \t\n") {
		return fmt.Errorf("%q is not the name of an interface", name[:min(len(name), 32)])
	}
	return nil
}

const (
	leasePrefix = "ipam/lease/"
	duidKey     = "ipam/duid"
)

func (k poolKey) leases() string            { return leasePrefix + k.space + "," + k.prefix.String() + "/" }
func (k poolKey) lease(a netip.Addr) string { return k.leases() + a.String() }

// leaseRecord is a lease with whom it is for. It is written before the record of
// the address and deleted after it: one alone is to be given back.
type leaseRecord struct {
	Version int
	Key     string // of the identity, see identity
	Station dhcp.Station
	Lease   dhcp.Lease
}

// leased is a lease that an endpoint has.
type leased struct {
	leaseRecord
	rev      uint64
	next     time.Time // when to ask for more time
	trouble  string    // why the last time it was not got; "" if it was
	squatted bool      // a station of the LAN has the address
}

func (l *leased) expires() time.Time { return l.Lease.Granted.Add(l.Lease.Valid) }

// leaseCounts is how often something happened since the process started.
type leaseCounts struct {
	Granted  uint64 `json:"granted"`
	Extended uint64 `json:"extended"`
	Silent   uint64 `json:"silent"`  // nobody answered the question for more time
	Refused  uint64 `json:"refused"` // the server refused it, or had another address to offer
	Expired  uint64 `json:"expired"` // a lease ended while a container had the address
}

// Timing of extensions. RFC 2131, 4.4.5: half of the time that is left, but not
// more often than once a minute; leases of a few minutes cannot wait that long.
const (
	extendPause   = time.Minute
	extendAtOnce  = 8 // at the same time
	giveBackTime  = time.Second
	offerTime     = 3 * time.Second // for the check of a subnet that is given anyway
	leaseFraction = 10
)

// requestLeased makes a pool whose addresses the DHCP server on a link has.
// The subnet is the server's, or is compared with what it says.
func (i *IPAM) requestLeased(ctx context.Context, r poolRequest) (poolID, netip.Prefix, error) {
	link, given := r.opts.dhcp, r.prefix.IsValid()
	if r.space == GlobalSpace {
		return poolID{}, netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s: the leader of a swarm cannot ask a server for other hosts: make the network with --config-only on each node", link)
	}
	if r.bits != 0 || r.v6 && !given {
		return poolID{}, netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s: the server does not say how large an IPv6 subnet is: give it with --subnet", link)
	}
	release, err := i.change(ctx)
	if err != nil {
		return poolID{}, netip.Prefix{}, err
	}
	defer release()
	if err := i.loadDUID(ctx); err != nil {
		return poolID{}, netip.Prefix{}, err
	}
	var router netip.Prefix
	if !r.prefix.IsValid() || r.prefix.Addr().Is4() {
		if r.prefix, router, err = i.survey(ctx, link, r.prefix); err != nil {
			return poolID{}, netip.Prefix{}, err
		}
	}
	if given && r.sub.IsValid() {
		return poolID{}, netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s: the server chooses addresses: leave --ip-range out", link)
	}
	r.space = dhcpSpace + link
	for n := 2; ; n++ {
		if i.pool(r.poolKey) == nil && len(i.overlaps(r.poolKey)) == 0 {
			break
		}
		r.space = fmt.Sprint(dhcpSpace, link, ":", n)
	}
	return r.poolID, router, i.addPool(ctx, r.poolID, r.opts)
}

// survey asks what the server on a link has to offer. Where the subnet is given
// a server that is silent, or a link that is not there yet, will do.
func (i *IPAM) survey(ctx context.Context, link string, given netip.Prefix) (subnet, router netip.Prefix, err error) {
	if given.IsValid() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, offerTime)
		defer cancel()
	}
	l, err := i.dhcp.Offer(ctx, link, i.station(poolKey{space: dhcpSpace + link}, "", MAC{}))
	if err != nil && given.IsValid() {
		i.log.WithError(err).Warnf("subnet %s could not be compared with what the DHCP server on %s offers", given, link)
		return given, router, nil
	}
	if err != nil {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: %w", link, err)
	}
	subnet = l.Address.Masked()
	if given.IsValid() && given != subnet {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: the DHCP server %s hands out addresses of %s, not of %s: give --subnet %s, or leave it out",
			link, l.Server, subnet, given, subnet)
	}
	if err := validPool(subnet); err != nil {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: the DHCP server %s offered %s: %w", link, l.Server, l.Address, err)
	}
	if subnet.Contains(l.Router) {
		router = netip.PrefixFrom(l.Router, subnet.Bits())
	}
	return subnet, router, nil
}

// loadDUID makes sure that this host has a DUID: made once. The caller holds
// changes, or is Load.
func (i *IPAM) loadDUID(ctx context.Context) error {
	if i.duid != nil {
		return nil
	}
	have, err := i.store.List(ctx, duidKey)
	if err != nil {
		return err
	}
	if len(have) > 0 {
		i.duid = have[0].Value
		return nil
	}
	var uuid [16]byte
	_, _ = rand.Read(uuid[:]) // documented never to fail
	duid := dhcp.DUID(uuid)
	if _, err := i.store.Put(ctx, store.Record{Key: duidKey, Value: duid}); err != nil {
		return err
	}
	i.duid = duid
	return nil
}

// station is whom a lease of a pool is for: the same key is the same station,
// with the same MAC address unless one is reserved, on this host.
func (i *IPAM) station(k poolKey, key string, mac MAC) dhcp.Station {
	sum := sha256.Sum256([]byte(k.space + "," + key))
	s := dhcp.Station{MAC: mac, IAID: binary.BigEndian.Uint32(sum[:]), DUID: i.duid}
	if name, ok := strings.CutPrefix(key, nameKey); ok {
		s.Name = name
	}
	if mac == (MAC{}) {
		own := sha256.Sum256(append(sum[:], i.duid...))
		s.MAC = MAC(own[:6])
		s.MAC[0] = s.MAC[0]&^3 | 2 // locally administered, of one station (IEEE 802)
	}
	return s
}

// nameKey is how the key of a station begins whose name is known. Others are
// counted: the first one on a pool without a name is 1 again when it is made
// again, so that a server which remembers its clients knows it.
const nameKey = "name "

// identity chooses the key of a request and marks it as used; p.mu is held.
// hint is the address that it had last.
func (p *pool) identity(r *addressRequest) (key string, hint netip.Addr, mac MAC) {
	if r.name != "" {
		key = nameKey + r.name
		if p.keys[key] {
			r.name = "" // another container of that name runs
		}
	}
	if res, ok := p.reservation(r.name); ok {
		p.keys[key] = true
		return key, res.addr, res.mac
	}
	if r.name != "" {
		if b := p.byName[r.name]; b != nil {
			hint = b.Address
		}
		p.keys[key] = true
		return key, hint, mac
	}
	for n := 1; ; n++ {
		if key = fmt.Sprint(n); !p.keys[key] {
			p.keys[key] = true
			return key, hint, mac
		}
	}
}

// lease gets an address of a pool from the server. No lock is held while it is
// asked. The mask is the server's.
func (i *IPAM) lease(ctx context.Context, p *pool, r addressRequest) (netip.Prefix, error) {
	link := p.dhcp()
	if r.kind == kindGateway {
		return netip.Prefix{}, fmt.Errorf("the DHCP server on %s has named no router when the network was made: give its address with --gateway", link)
	}
	p.mu.Lock()
	p.adoptable = false
	if p.closed {
		p.mu.Unlock()
		return netip.Prefix{}, errPoolGone
	}
	if owner := p.reservedFor[r.want]; owner != "" && r.name != "" && r.name != owner {
		defer p.mu.Unlock()
		return netip.Prefix{}, p.othersName(r.want, owner)
	}
	lost := p.expire(i.now())
	key, hint, mac := p.identity(&r)
	_, reserved := p.reservation(r.name)
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)

	l := &leased{leaseRecord: leaseRecord{Version: recordVersion, Key: key, Station: i.station(p.poolKey, key, mac)}}
	var err error
	l.Lease, err = i.dhcp.Acquire(ctx, link, l.Station, cmp.Or(r.want, hint), p.prefix)
	if errors.Is(err, dhcp.ErrRefused) && !r.want.IsValid() && hint.IsValid() && !reserved {
		l.Lease, err = i.dhcp.Acquire(ctx, link, l.Station, netip.Addr{}, p.prefix)
	}
	if err == nil {
		err = i.keepLease(ctx, p, r, l)
	}
	if err != nil {
		p.mu.Lock()
		delete(p.keys, key)
		p.mu.Unlock()
		return netip.Prefix{}, err
	}
	i.bind(ctx, p, l.Lease.Address.Addr(), r.name)
	i.wakeLeases()
	return l.Lease.Address, nil
}

// keepLease writes down what was leased: the lease, then the address. If that
// fails the lease is given back.
func (i *IPAM) keepLease(ctx context.Context, p *pool, r addressRequest, l *leased) error {
	a := l.Lease.Address.Addr()
	p.mu.Lock()
	if p.closed || p.taken.has(a) {
		closed := p.closed
		p.mu.Unlock()
		if closed {
			i.giveBack(ctx, p, l)
			return errPoolGone
		}
		// It forgot its leases, or there are two that know nothing of each other.
		l.squatted = true
		i.giveBack(ctx, p, l)
		return fmt.Errorf("the DHCP server %s granted %s, which another container of this host has: see whether it has lost its leases", l.Lease.Server, a)
	}
	p.taken.add(a)
	p.busy[a] = &busy{done: make(chan struct{})}
	l.next = l.Lease.Granted.Add(l.Lease.Renew)
	p.leased[a] = l
	p.counts.Granted++
	p.mu.Unlock()
	err := i.putLease(ctx, p, l)
	if err == nil {
		if r.kind == kindAuto && r.name != "" {
			r.kind = kindNamed
		}
		return i.write(ctx, p, a, r, false)
	}
	p.mu.Lock()
	b := p.busy[a]
	close(b.done)
	p.taken.remove(a)
	delete(p.leased, a)
	p.idle(a, b)
	p.mu.Unlock()
	i.giveBack(ctx, p, l)
	return err
}

func (i *IPAM) putLease(ctx context.Context, p *pool, l *leased) error {
	v, err := json.Marshal(l.leaseRecord)
	if err != nil {
		return err
	}
	r, err := i.store.Put(ctx, store.Record{Key: p.lease(l.Lease.Address.Addr()), Value: v, Rev: l.rev})
	if err == nil {
		l.rev = r.Rev
	}
	return err
}

// unlease ends the lease of an address that was just freed: it is given back,
// unless a name is to have it again. The address is still busy.
func (i *IPAM) unlease(ctx context.Context, p *pool, a netip.Addr) {
	p.mu.Lock()
	l := p.leased[a]
	bound := p.byAddr[a] != nil
	p.mu.Unlock()
	if l == nil {
		return
	}
	if !bound || l.squatted {
		i.giveBack(ctx, p, l)
	}
	if err := i.store.Delete(ctx, p.lease(a)); err != nil {
		i.log.WithField("pool", p.prefix.String()).WithError(err).Debug("the record of a lease was not deleted; the next start does it")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.leased, a)
	delete(p.keys, l.Key)
}

// giveBack tells the server that a lease is not needed. Where that does not reach
// it, the lease runs out.
func (i *IPAM) giveBack(ctx context.Context, p *pool, l *leased) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTime)
	defer cancel()
	tell := i.dhcp.Release
	if l.squatted {
		tell = i.dhcp.Decline
	}
	if err := tell(ctx, p.dhcp(), l.Station, l.Lease); err != nil {
		i.log.WithField("pool", p.prefix.String()).WithError(err).Infof("the DHCP server could not be told that %s is not needed", l.Lease.Address.Addr())
	}
}

// loadLeases reads the leases. Those without an address are given back.
func (i *IPAM) loadLeases(ctx context.Context, pools map[poolKey]*pool) error {
	list, err := i.store.List(ctx, leasePrefix)
	if err != nil {
		return err
	}
	needed := len(list) > 0
	for k := range pools {
		needed = needed || k.dhcp() != ""
	}
	if !needed {
		return nil
	}
	if err := i.loadDUID(ctx); err != nil {
		return err
	}
	for _, r := range list {
		l := &leased{rev: r.Rev}
		if err := decode(r.Key, r.Value, &l.leaseRecord, &l.Version); err != nil {
			return err
		}
		a := l.Lease.Address.Addr()
		at := strings.LastIndexByte(r.Key, '/')
		id, err := parsePoolID(strings.TrimPrefix(r.Key[:max(at, len(leasePrefix))], leasePrefix))
		if err != nil || id.lease(a) != r.Key {
			return fmt.Errorf("record %s: it is not that of a lease in a pool", r.Key)
		}
		p := pools[id.poolKey]
		if p == nil || !p.taken.has(a) {
			i.stray = append(i.stray, strayLease{newPool(id), l})
			continue
		}
		l.next = l.Lease.Granted.Add(l.Lease.Renew)
		p.leased[a], p.keys[l.Key] = l, true
	}
	return nil
}

// strayLease is one that the engine was never told of, or has given back.
type strayLease struct {
	pool *pool
	*leased
}

// dropLeases gives back what is left in a pool that goes.
func (i *IPAM) dropLeases(ctx context.Context, p *pool) error {
	p.mu.Lock()
	var left []*leased
	for _, l := range p.leased {
		left = append(left, l)
	}
	p.mu.Unlock()
	g := errgroup.Group{}
	g.SetLimit(extendAtOnce)
	for _, l := range left {
		g.Go(func() error { i.giveBack(ctx, p, l); return nil })
	}
	_ = g.Wait()
	return i.store.DeletePrefix(ctx, p.leases())
}

func (i *IPAM) wakeLeases() {
	select {
	case i.leases <- struct{}{}:
	default:
	}
}

// extend asks for more time for leases, each when it is due, until ctx ends.
func (i *IPAM) extend(ctx context.Context) error {
	for _, s := range i.stray {
		i.giveBack(ctx, s.pool, s.leased)
		if err := i.store.Delete(ctx, s.pool.lease(s.Lease.Address.Addr())); err != nil && ctx.Err() == nil {
			i.log.WithError(err).Debug("the record of a lease was not deleted; the next start does it")
		}
	}
	i.stray = nil
	for {
		var due <-chan time.Time
		if at, ok := i.nextLease(); ok {
			due = time.After(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-i.leases:
		case <-due:
			i.extendDue(ctx)
		}
	}
}

// nextLease is when the next lease is due.
func (i *IPAM) nextLease() (at time.Time, ok bool) {
	for _, p := range i.leasedPools() {
		p.mu.Lock()
		for _, l := range p.leased {
			if !ok || l.next.Before(at) {
				at, ok = l.next, true
			}
		}
		p.mu.Unlock()
	}
	return at, ok
}

func (i *IPAM) leasedPools() []*pool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	var out []*pool
	for k, p := range i.pools {
		if k.dhcp() != "" {
			out = append(out, p)
		}
	}
	return out
}

// extendDue asks for all leases whose time has come.
func (i *IPAM) extendDue(ctx context.Context) {
	g := errgroup.Group{}
	g.SetLimit(extendAtOnce)
	for _, p := range i.leasedPools() {
		p.mu.Lock()
		var due []*leased
		for _, l := range p.leased {
			if !l.next.After(i.now()) {
				due = append(due, l)
			}
		}
		p.mu.Unlock()
		for _, l := range due {
			g.Go(func() error { i.extendOne(ctx, p, l); return nil })
		}
	}
	_ = g.Wait()
}

// extendOne asks for one lease. When it is over, or was refused, the container
// goes on using the address, because nothing could take it away: the same one
// is asked for as a new lease then.
func (i *IPAM) extendOne(ctx context.Context, p *pool, l *leased) {
	a, over := l.Lease.Address.Addr(), i.now().After(l.expires())
	var got dhcp.Lease
	var err error
	if !over && !strings.HasPrefix(l.trouble, refused) {
		got, err = i.dhcp.Extend(ctx, p.dhcp(), l.Station, l.Lease)
	} else {
		got, err = i.dhcp.Acquire(ctx, p.dhcp(), l.Station, a, p.prefix)
	}
	if ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	if p.leased[a] != l || p.busy[a] != nil || p.closed { // it is being freed
		p.mu.Unlock()
		return
	}
	now, before := i.now(), l.trouble
	switch {
	case err == nil:
		l.Lease, l.trouble, l.next = got, "", got.Granted.Add(got.Renew)
		p.counts.Extended++
	case errors.Is(err, dhcp.ErrRefused):
		l.trouble, l.next = refused+": "+err.Error(), now.Add(l.least())
		p.counts.Refused++
	default:
		l.trouble, l.next = err.Error(), now.Add(l.pause(now))
		p.counts.Silent++
	}
	if over && before == "" && err != nil || err != nil && !over && now.After(l.expires()) {
		p.counts.Expired++
	}
	record, rev := l.leaseRecord, l.rev
	p.mu.Unlock()
	log := i.log.WithField("pool", p.prefix.String())
	switch {
	case err != nil && before == "":
		log.WithError(err).Warnf("the lease of %s, which ends %s, was not extended: its container keeps the address, and it is asked for again", a, l.expires().Format(time.RFC3339))
	case err == nil && before != "":
		log.Infof("the lease of %s is extended again", a)
	}
	if err != nil {
		return
	}
	next := &leased{leaseRecord: record, rev: rev}
	if err := i.putLease(ctx, p, next); err != nil {
		log.WithError(err).Debug("an extended lease was not written down")
		return
	}
	p.mu.Lock()
	l.rev = next.rev
	p.mu.Unlock()
}

// refused is how the trouble of a lease begins that the server has taken away.
const refused = "refused"

// pause is how long to wait after a question that nobody answered; p.mu is held.
func (l *leased) pause(now time.Time) time.Duration { return max(l.expires().Sub(now)/2, l.least()) }

func (l *leased) least() time.Duration {
	return min(extendPause, max(l.Lease.Valid/leaseFraction, time.Second))
}

// squat notes that a station of the LAN has a leased address, for when it is
// freed.
func (i *IPAM) squat(id poolID, a netip.Addr) {
	p := i.pool(id.poolKey)
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.leased[a]; l != nil {
		l.squatted = true
	}
}
