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
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/internal/store"
)

// leaser asks the DHCP servers of a LAN.
type leaser interface {
	Offer(ctx context.Context, link string, s dhcp.Station, six bool) (dhcp.Lease, error)
	Acquire(ctx context.Context, link string, s dhcp.Station, want netip.Addr, within netip.Prefix) (dhcp.Lease, error)
	AcquireAfter(ctx context.Context, link string, s dhcp.Station, want netip.Addr, within netip.Prefix, first func(dhcp.Lease) error) (dhcp.Lease, error)
	Extend(ctx context.Context, link string, s dhcp.Station, l dhcp.Lease) (dhcp.Lease, error)
	Carrier(link string) (changes uint32, up bool)
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
		return fmt.Errorf("%q is not the name of an interface: name one that ip link shows", name[:min(len(name), 32)])
	}
	return nil
}

const (
	leasePrefix = "ipam/lease/"
	duidKey     = "ipam/duid"
)

func (k poolKey) leases() string            { return leasePrefix + k.space + "," + k.prefix.String() + "/" }
func (k poolKey) lease(a netip.Addr) string { return k.leases() + a.String() }

// leaseRecord is a lease with whom it is for. It is written before the server is
// asked for what it offers and before the record of the address, and deleted after
// that: one alone is to be given back.
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
	ended    bool      // it is over, and was counted as that
	void     bool      // the server refused what it had offered
	// forgotten: the server offers the address to others; it is asked for anew.
	forgotten bool
	asking    bool // the request that it is for has not ended
	// While it is being extended: what ends that, and what is closed then.
	stop      context.CancelFunc
	extending chan struct{}
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
	returnTime    = 3 * time.Second // for all leases of a pool
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
	if r.bits != 0 {
		return poolID{}, netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s: the subnet is that of the LAN: leave --subnet out, or give the whole", link)
	}
	release, err := i.change(ctx)
	if err != nil {
		return poolID{}, netip.Prefix{}, err
	}
	err = i.loadDUID(ctx)
	release() // others do not wait for a server that is silent
	if err != nil {
		return poolID{}, netip.Prefix{}, err
	}
	if r.v6 && !given {
		if r.prefix, err = i.survey6(ctx, link, r.opts.tellingOf("")); err != nil {
			return poolID{}, netip.Prefix{}, err
		}
	}
	// DHCPv6 names no router: containers hear of it as other stations do.
	router := noGateway(r.prefix)
	if !r.prefix.IsValid() || r.prefix.Addr().Is4() {
		if r.prefix, router, err = i.survey(ctx, link, r.prefix, r.opts.tellingOf("")); err != nil {
			return poolID{}, netip.Prefix{}, err
		}
	}
	if err := r.opts.checkFallback(r.poolKey); err != nil {
		return poolID{}, netip.Prefix{}, err
	}
	if given && r.sub.IsValid() {
		return poolID{}, netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s: the server chooses addresses: leave --ip-range out", link)
	}
	if release, err = i.change(ctx); err != nil {
		return poolID{}, netip.Prefix{}, err
	}
	defer release()
	r.space = dhcpSpace + link
	for n := 2; ; n++ {
		if i.pool(r.poolKey) == nil && len(i.overlaps(r.poolKey)) == 0 {
			break
		}
		r.space = fmt.Sprint(dhcpSpace, link, ":", n)
	}
	return r.poolID, router, i.addPool(ctx, r.poolID, r.opts)
}

// noGateway is what says that a subnet has no gateway: engines up to 27 do not take
// none for an answer, and ask for one.
func noGateway(subnet netip.Prefix) netip.Prefix {
	if !subnet.IsValid() {
		return netip.Prefix{}
	}
	a := netip.IPv4Unspecified()
	if subnet.Addr().Is6() {
		a = netip.IPv6Unspecified()
	}
	return netip.PrefixFrom(a, subnet.Bits())
}

// survey asks what the server on a link has to offer. Where the subnet is given
// a server that is silent, or a link that is not there yet, will do. all is what the
// server is told of every container.
func (i *IPAM) survey(ctx context.Context, link string, given netip.Prefix, all telling) (subnet, router netip.Prefix, err error) {
	ctx, cancel := beforeAnswer(ctx)
	defer cancel()
	if given.IsValid() {
		ctx, cancel = context.WithTimeout(ctx, offerTime)
		defer cancel()
	}
	nobody := i.station(poolKey{space: dhcpSpace + link}, "", MAC{})
	all.apply(&nobody, "")
	l, err := i.dhcp.Offer(ctx, link, nobody, false)
	if err != nil && given.IsValid() {
		i.log.WithError(err).Warnf("subnet %s could not be compared with what the DHCP server on %s offers", given, link)
		return given, netip.Prefix{}, nil
	}
	if err != nil {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: %w", link, err)
	}
	subnet = l.Address.Masked()
	switch alone := l.Address.IsSingleIP(); { // the mask /32 says nothing of the subnet
	case alone && given.Contains(l.Address.Addr()):
		subnet = given
	case alone && !given.IsValid():
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: the DHCP server %s offered %s with the mask of one address: give the LAN's subnet with --subnet", link, l.Server, l.Address.Addr())
	}
	if given.IsValid() && given != subnet && subnet.IsSingleIP() {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: the DHCP server %s offered %s, which is not in %s: give the LAN's subnet with --subnet", link, l.Server, l.Address.Addr(), given)
	}
	if given.IsValid() && given != subnet {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: the DHCP server %s hands out addresses of %s, not of %s: give --subnet %s, or leave it out",
			link, l.Server, subnet, given, subnet)
	}
	if err := validPool(subnet); err != nil {
		return subnet, router, fmt.Errorf("ipam option dhcp=%s: the DHCP server %s offered %s: %w", link, l.Server, l.Address, err)
	}
	if router = noGateway(subnet); subnet.Contains(l.Router) {
		router = netip.PrefixFrom(l.Router, subnet.Bits())
	}
	return subnet, router, nil
}

// lanBits is how large the IPv6 subnets of LANs are that a router advertises
// (RFC 4862, 5.5.3; RFC 7421).
const lanBits = 64

// survey6 works out the IPv6 subnet of the LAN on a link: that of an address which the
// server has to offer, as large as the host has it, or else as those of LANs are.
// The engine compares a subnet that it was not given with the host's routes, and asks
// for another for ever if it overlaps one: then somebody has to type it.
func (i *IPAM) survey6(ctx context.Context, link string, all telling) (netip.Prefix, error) {
	nobody := i.station(poolKey{space: dhcpSpace + link}, "", MAC{})
	all.apply(&nobody, "")
	l, err := i.dhcp.Offer(ctx, link, nobody, true)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s, IPv6: %w: give the subnet with --subnet, or leave --ipv6 out", link, err)
	}
	a := l.Address.Addr()
	host, err := i.host(ctx)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("look at the host's routes: %w", err)
	}
	subnet := netip.PrefixFrom(a, lanBits).Masked()
	overlaps := false
	for _, p := range host {
		if p.Addr().Is4() || p.Bits() == 0 {
			continue
		}
		if p.Contains(a) && p.Bits() < a.BitLen() && (!overlaps || p.Bits() > subnet.Bits()) {
			subnet = p.Masked()
		}
		overlaps = overlaps || p.Overlaps(subnet)
	}
	if overlaps {
		return netip.Prefix{}, fmt.Errorf("ipam option dhcp=%s: the server hands out %s, of a subnet that this host is in: give --subnet %s", link, a, subnet)
	}
	return subnet, validPool(subnet)
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
	if mac == (MAC{}) {
		own := sha256.Sum256(append(sum[:], i.duid...))
		s.MAC = MAC(own[:6])
		s.MAC[0] = s.MAC[0]&^3 | 2 // locally administered, of one station (IEEE 802)
	}
	return s
}

// stationIn is the station, with what its server is told of it.
func (i *IPAM) stationIn(p *pool, key string, mac MAC) dhcp.Station {
	s := i.station(p.poolKey, key, mac)
	name := named(key)
	p.mu.Lock()
	t := p.opts.tellingOf(name)
	p.mu.Unlock()
	t.apply(&s, name)
	return s
}

// nameKey is how the key of a station begins whose name is known. Others are
// counted: the first one on a pool without a name is 1 again when it is made
// again, so that a server which remembers its clients knows it.
const nameKey = "name "

// named is the container's name in the key of a station, "" in that of a counted one.
func named(key string) string {
	name, ok := strings.CutPrefix(key, nameKey)
	if !ok {
		return ""
	}
	return name
}

// identity chooses the key of a request and marks it as used; p.mu is held.
// hint is the address that it had last.
func (p *pool) identity(r *addressRequest, now time.Time) (key string, hint netip.Addr, mac MAC) {
	if owner := p.reservedFor[r.want]; r.name == "" && owner != "" && !p.keys[nameKey+owner] {
		res, _ := p.reservation(owner) // asked for by number: it is the owner, before Docker 29
		key = nameKey + owner
		p.keys[key] = true
		return key, res.addr, res.mac
	}
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
	if key, ok := p.keyBack(now); ok {
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
	ctx, cancel := beforeAnswer(ctx)
	defer cancel()
	link := p.dhcp()
	if r.kind == kindGateway {
		return netip.Prefix{}, fmt.Errorf("the DHCP server on %s could not be asked for its router when the network was made: give its address with --gateway", link)
	}
	p.mu.Lock()
	p.use(r.id.sub)
	if p.closed {
		p.mu.Unlock()
		return netip.Prefix{}, errPoolGone
	}
	if owner := p.reservedFor[r.want]; owner != "" && r.name != "" && r.name != owner {
		defer p.mu.Unlock()
		return netip.Prefix{}, p.othersName(r.want, owner)
	}
	lost := p.expire(i.now())
	key, hint, mac := p.identity(&r, i.now())
	_, reserved := p.reservation(r.name)
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)

	q := &asking{pool: p, record: leaseRecord{Version: recordVersion, Key: key, Station: i.stationIn(p, key, mac)}}
	a, err := i.ask(ctx, q, r, cmp.Or(r.want, hint))
	if (errors.Is(err, dhcp.ErrRefused) || errors.Is(err, dhcp.ErrNoOffer)) && !r.want.IsValid() && hint.IsValid() && !reserved {
		a, err = i.ask(ctx, q, r, netip.Addr{})
	}
	if errors.Is(err, dhcp.ErrRefused) && r.want.IsValid() {
		err = i.ownReason(ctx, p, r, err)
	}
	if errors.Is(err, dhcp.ErrRefused) && r.want.IsValid() && p.reserves(r.want) == "" {
		err = fmt.Errorf("%w; if it keeps %s for a MAC address, say so here, too: `weft address reserve CONTAINER %s MAC`", err, r.want, r.want)
	}
	if err != nil {
		if errors.Is(err, dhcp.ErrRefused) {
			q.refuse()
		}
		i.unhold(ctx, q)
	}
	p.mu.Lock()
	owner := p.reservedFor[a.Addr()]
	if q.leased != nil {
		q.asking = false
	}
	if err != nil && !p.marked(q.leased) {
		delete(p.keys, key)
	}
	p.mu.Unlock()
	if err != nil {
		return netip.Prefix{}, err
	}
	if owner != "" && owner != r.name && !r.want.IsValid() {
		i.log.WithField("pool", p.prefix.String()).Warnf("the DHCP server has leased %s, which is reserved for %s, to another container: reserve it on the server too, or choose one that it does not hand out", a.Addr(), owner)
	}
	i.bind(ctx, p, a.Addr(), r)
	i.wakeLeases()
	return a, nil
}

// reserves is whom an address is reserved for.
func (p *pool) reserves(a netip.Addr) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.reservedFor[a]
}

// asking is a request for a lease on its way.
type asking struct {
	pool    *pool
	record  leaseRecord
	*leased       // what is marked and written down; nil before
	busy    *busy // the mark of its address; nil when it is not ours any more
}

// marked reports whether a lease is that of its address; p.mu is held.
func (p *pool) marked(l *leased) bool { return l != nil && p.leased[l.Lease.Address.Addr()] == l }

// ask gets a lease and writes it down.
func (i *IPAM) ask(ctx context.Context, q *asking, r addressRequest, want netip.Addr) (netip.Prefix, error) {
	l, err := i.dhcp.AcquireAfter(ctx, q.pool.dhcp(), q.record.Station, want, q.pool.prefix, func(offer dhcp.Lease) error {
		q.refuse()
		i.unhold(ctx, q) // of an offer that turned out to be none
		return i.hold(ctx, q, r, offer)
	})
	if err != nil {
		return netip.Prefix{}, err
	}
	// The mask is the network's, whatever the server says by now: a wider one would
	// lead past the container's other networks.
	if l.Address.Addr().Is4() && l.Address.Bits() != q.pool.prefix.Bits() && !l.Address.IsSingleIP() {
		i.log.WithField("pool", q.pool.prefix.String()).Warnf("the DHCP server %s gives %s the mask of %s: containers go on with that of the network", l.Server, l.Address.Addr(), l.Address.Masked())
	}
	return q.pool.with(l.Address.Addr()), i.keepLease(ctx, q, r, l)
}

// refuse notes that the server has refused what is held: there is nothing to be
// given back.
func (q *asking) refuse() {
	if q.busy == nil {
		return
	}
	q.pool.mu.Lock()
	defer q.pool.mu.Unlock()
	q.void = true
}

// hold marks an address that is offered and writes the lease down, before it is
// one. What is known to be taken is no offer.
func (i *IPAM) hold(ctx context.Context, q *asking, r addressRequest, offer dhcp.Lease) error {
	p, a := q.pool, offer.Address.Addr()
	for {
		p.mu.Lock()
		b := p.busy[a]
		switch {
		case p.closed:
			p.mu.Unlock()
			return errPoolGone
		case b != nil && b.queued:
			p.mu.Unlock()
			return fmt.Errorf("address %s of pool %s, which the DHCP server offers, is still being released: try again", a, p.prefix)
		case b != nil: // released just now, and the server knows that already
			p.mu.Unlock()
			select {
			case <-b.done:
				continue
			case <-ctx.Done():
				return fmt.Errorf("address %s of pool %s is still being written: %w", a, p.prefix, ctx.Err())
			}
		case p.taken.has(a):
			p.mu.Unlock()
			return i.noOffer(ctx, p, offer)
		case r.want != a && p.isDeclined(a, i.now()):
			p.mu.Unlock()
			return p.offeredAgain(offer)
		}
		q.leased = &leased{leaseRecord: q.record, asking: true, next: offer.Granted.Add(offer.Renew)}
		q.Lease = offer
		q.busy = &busy{done: make(chan struct{})}
		p.taken.add(a)
		p.busy[a], p.leased[a] = q.busy, q.leased
		p.awaited[a] = i.now() // its endpoint cannot be there before the call ends
		p.mu.Unlock()
		return i.putLease(ctx, p, q.leased)
	}
}

// unhold gives back what is held, as the server may have granted it. What cannot
// be done now Run does.
func (i *IPAM) unhold(ctx context.Context, q *asking) {
	if q.busy == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	_ = i.free(ctx, q.pool, q.Lease.Address.Addr(), q.busy)
	q.busy = nil
}

// keepLease completes the records of what was granted: the lease, if it is not as
// was offered, then the address. If that fails the lease is given back.
func (i *IPAM) keepLease(ctx context.Context, q *asking, r addressRequest, got dhcp.Lease) error {
	p, a := q.pool, got.Address.Addr()
	p.mu.Lock()
	offer := q.Lease
	q.Lease, q.next = got, got.Granted.Add(got.Renew)
	p.mu.Unlock()
	if offer.Granted = got.Granted; !reflect.DeepEqual(offer, got) {
		if err := i.putLease(ctx, p, q.leased); err != nil {
			return err
		}
	}
	if r.kind == kindAuto && r.name != "" {
		r.kind = kindNamed
	}
	err := i.write(ctx, p, a, r, q.busy, false)
	q.busy = nil // if it failed Run gives the lease back
	if err == nil {
		p.mu.Lock()
		p.counts.Granted++
		p.mu.Unlock()
	}
	return err
}

// putLease writes a lease over whatever there is: nobody else writes those of an
// address that is marked, but one may be left that could not be deleted, and which
// revision a write had that was given up nobody knows.
func (i *IPAM) putLease(ctx context.Context, p *pool, l *leased) error {
	p.mu.Lock()
	key, rev := p.lease(l.Lease.Address.Addr()), l.rev
	v, err := json.Marshal(l.leaseRecord)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	for range 2 {
		var r store.Record
		if r, err = i.store.Put(ctx, store.Record{Key: key, Value: v, Rev: rev}); err == nil {
			p.mu.Lock()
			l.rev = r.Rev
			p.mu.Unlock()
			return nil
		}
		if !errors.Is(err, store.ErrExists) && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		var rerr error
		if rev, rerr = i.revision(ctx, key); rerr != nil {
			return rerr
		}
	}
	return err
}

// unlease ends the lease of an address that was just freed: it is given back,
// unless a name is to have it again. The address is still busy. It returns whose
// it was, if that was a station without a name.
func (i *IPAM) unlease(ctx context.Context, p *pool, a netip.Addr) (key string) {
	p.mu.Lock()
	l := p.leased[a]
	p.mu.Unlock()
	if l == nil {
		return ""
	}
	p.endExtension(l)
	p.mu.Lock()
	tell := !l.void && (l.squatted || !p.keeps(l))
	p.mu.Unlock()
	if tell {
		i.giveBack(ctx, p, l)
	}
	if err := i.store.Delete(ctx, p.lease(a)); err != nil {
		i.log.WithField("pool", p.prefix.String()).WithError(err).Debug("the record of a lease was not deleted; the next start does it")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.leased, a)
	// An old lease of the same station may have been left on disk.
	another := func(o *leased) bool { return o.Key == l.Key }
	if !l.asking && !slices.ContainsFunc(slices.Collect(maps.Values(p.leased)), another) {
		delete(p.keys, l.Key)
	}
	if strings.HasPrefix(l.Key, nameKey) {
		return ""
	}
	return l.Key
}

// keeps reports whether the name that a lease is for is to have the address again,
// and that is on disk; p.mu is held.
func (p *pool) keeps(l *leased) bool {
	a := l.Lease.Address.Addr()
	if name := p.reservedFor[a]; name != "" {
		return l.Key == nameKey+name
	}
	b := p.byAddr[a]
	return b != nil && b.rev != 0 && l.Key == nameKey+b.name
}

// endExtension waits until a lease is not being asked for any more: a server would
// take the question for one for a new lease after this one was given back.
func (p *pool) endExtension(l *leased) {
	p.mu.Lock()
	stop, done := l.stop, l.extending
	p.mu.Unlock()
	if done != nil {
		stop()
		<-done
	}
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

// loadLeases reads the leases. Those without an address are given back, by Run,
// unless a name keeps them; until then their addresses are taken.
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
	stray, back := map[poolKey][]*leased{}, []cleanup(nil)
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
		l.resume(i.now())
		p := pools[id.poolKey]
		if p == nil {
			stray[id.poolKey] = append(stray[id.poolKey], l)
			continue
		}
		if !p.taken.has(a) && p.keeps(l) {
			if err := i.store.Delete(ctx, r.Key); err != nil {
				return err
			}
			continue
		}
		if !p.taken.has(a) {
			b := &busy{queued: true}
			p.taken.add(a)
			p.busy[a] = b
			back = append(back, cleanup{pool: p, addr: a, busy: b})
		}
		p.leased[a], p.keys[l.Key] = l, true
	}
	i.stray = stray
	for _, c := range back {
		i.later(c)
	}
	return nil
}

// resume has a lease run on the clock of this process, which nobody sets. One that
// the clock says was granted in the future, as it does on a board without a
// battery before it has heard the time, is asked for at once.
func (l *leased) resume(now time.Time) {
	age := now.Sub(l.Lease.Granted)
	l.Lease.Granted = now.UTC().Add(-max(age, 0))
	l.next = l.Lease.Granted.Add(l.Lease.Renew)
	if age < 0 {
		l.next = now
	}
}

// returnStrays gives back the leases of a pool that is gone: the process died while
// it released the pool. The caller holds changes.
func (i *IPAM) returnStrays(ctx context.Context, k poolKey) {
	left := i.stray[k]
	delete(i.stray, k)
	if len(left) > 0 {
		if err := i.returnLeases(ctx, newPool(poolID{poolKey: k}), left); err != nil {
			i.log.WithField("pool", k.prefix.String()).WithError(err).Debug("the records of leases were not deleted; the next start does it")
		}
	}
}

// dropLeases gives back what is left in a pool that goes.
func (i *IPAM) dropLeases(ctx context.Context, p *pool) error {
	p.mu.Lock()
	left := slices.Collect(maps.Values(p.leased))
	p.mu.Unlock()
	for _, l := range left {
		p.endExtension(l)
	}
	return i.returnLeases(ctx, p, left)
}

// returnLeases gives leases back, as long as there is time, and deletes all that is
// on disk of a pool's.
func (i *IPAM) returnLeases(ctx context.Context, p *pool, left []*leased) error {
	end := time.Now().Add(returnTime)
	g := errgroup.Group{}
	g.SetLimit(extendAtOnce)
	for _, l := range left {
		g.Go(func() error {
			if time.Now().Before(end) {
				i.giveBack(ctx, p, l)
			}
			return nil
		})
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
	if release, err := i.change(ctx); err == nil {
		for k := range i.stray {
			i.returnStrays(ctx, k)
		}
		release()
	}
	var running sync.WaitGroup
	defer running.Wait()
	last := look{slept: i.asleep()}
	for {
		var due <-chan time.Time
		if at, ok := i.nextLease(); ok {
			due = time.After(min(time.Until(at), lookTime))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-i.leases:
		case <-due:
			i.lookAround(&last)
			i.extendDue(ctx, &running)
		}
	}
}

// nextLease is when the next lease is due.
func (i *IPAM) nextLease() (at time.Time, ok bool) {
	for _, p := range i.leasedPools() {
		p.mu.Lock()
		for a, l := range p.leased {
			if p.extends(a, l) && (!ok || l.next.Before(at)) {
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

// extends reports whether a lease is one that is asked for when it is due: not if
// that is being done, and not if it is being made or given back; p.mu is held.
func (p *pool) extends(a netip.Addr, l *leased) bool {
	return l.extending == nil && p.busy[a] == nil && !p.closed
}

// extendDue begins to ask for all leases whose time has come. A server that is
// silent holds up only those of its own pool. What no endpoint has is given back.
func (i *IPAM) extendDue(ctx context.Context, running *sync.WaitGroup) {
	for _, p := range i.leasedPools() {
		if !p.anyDue(i.now()) {
			continue
		}
		unused := i.endless(p) // not under the lock: it asks the driver
		p.mu.Lock()
		for a, l := range p.leased {
			if !p.extends(a, l) || l.next.After(i.now()) {
				continue
			}
			if p.awaited[a].IsZero() && unused(a) {
				l.next = i.now().Add(extendPause) // should it not be freed
				running.Go(func() { i.forsakeOne(ctx, p, a, time.Time{}, "no endpoint has it any more") })
				continue
			}
			running.Go(i.extending(ctx, p, l))
		}
		p.mu.Unlock()
	}
}

// extending marks a lease as being asked for, and returns what asks; p.mu is held.
func (i *IPAM) extending(ctx context.Context, p *pool, l *leased) (ask func()) {
	ctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	l.stop, l.extending = stop, done
	return func() {
		defer i.wakeLeases()
		defer close(done)
		defer stop()
		select {
		case p.asks <- struct{}{}:
			i.extendOne(ctx, p, l)
			<-p.asks
		case <-ctx.Done():
		}
		p.mu.Lock()
		l.stop, l.extending = nil, nil
		p.mu.Unlock()
	}
}

// anyDue reports whether a lease of the pool is to be asked for.
func (p *pool) anyDue(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for a, l := range p.leased {
		if p.extends(a, l) && !l.next.After(now) {
			return true
		}
	}
	return false
}

// extendOne asks for one lease. When it is over, or was refused, the container
// goes on using the address, because nothing could take it away: the same one
// is asked for as a new lease then.
func (i *IPAM) extendOne(ctx context.Context, p *pool, l *leased) {
	a, over := l.Lease.Address.Addr(), i.now().After(l.expires())
	var got dhcp.Lease
	var err error
	if !over && !l.forgotten && !strings.HasPrefix(l.trouble, refused) {
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
		l.Lease, l.trouble, l.next, l.forgotten = got, "", got.Granted.Add(got.Renew), false
		p.counts.Extended++
	case errors.Is(err, dhcp.ErrRefused):
		l.trouble, l.next = refused+": "+err.Error(), now.Add(l.least())
		p.counts.Refused++
	default:
		l.trouble, l.next = err.Error(), now.Add(l.pause(now))
		p.counts.Silent++
	}
	if ended := err != nil && now.After(l.expires()); ended != l.ended {
		l.ended = ended
		if ended {
			p.counts.Expired++
		}
	}
	p.mu.Unlock()
	log := i.log.WithField("pool", p.prefix.String())
	switch {
	case err != nil && before == "":
		log.WithError(err).Warnf("the lease of %s, which ends %s, was not extended: its container keeps the address, and it is asked for again", a, l.expires().Format(time.RFC3339))
	case err == nil && before != "":
		log.Infof("the lease of %s is extended again", a)
		p.hasten(now, (*leased).unanswered) // the server is back for the others, too
	}
	if err != nil {
		return
	}
	if err := i.putLease(ctx, p, l); err != nil {
		log.WithError(err).Debug("an extended lease was not written down")
	}
}

// refused is how the trouble of a lease begins that the server has taken away.
const refused = "refused"

// pause is how long to wait after a question that nobody answered; p.mu is held.
func (l *leased) pause(now time.Time) time.Duration {
	return max(l.expires().Sub(now)/2, l.least())
}

func (l *leased) least() time.Duration {
	return min(extendPause, max(l.Lease.Valid/leaseFraction, time.Second))
}

// squat notes that a station of the LAN has an address, for when it is freed: a
// lease is declined, another address is not tried again for a while.
func (i *IPAM) squat(id poolID, a netip.Addr) {
	p := i.pool(id.poolKey)
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	i.history.void(id.poolKey, a)
	if l := p.leased[a]; l != nil {
		l.squatted, p.declined[a] = true, i.now()
	}
	if p.leased[a] == nil && !p.reserved(a) && p.byAddr[a] == nil {
		p.restIn(&p.quarantined, release{a, i.now()})
	}
}
