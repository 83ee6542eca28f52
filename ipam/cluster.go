package ipam

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// What is in the store of the cluster, and what a host still has to delete
// there, which it writes on its own disk.
//
//	space/NAME/pools               a table: the pools of a space and who has them
//	space/NAME/addr/POOL/ADDRESS   a claim: who has an address, or which name keeps it
const (
	spaceKeys = "space/"
	owedKeys  = "ipam/release/"
)

// claims is what hosts write there. Put and Remove change exactly the revision
// that they are given, or nothing.
type claims interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Get(ctx context.Context, key string) (store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Remove(ctx context.Context, r store.Record) error
}

// feed is how they learn what others wrote.
type feed interface {
	Follow(ctx context.Context, prefix string, snapshot func([]store.Record), event func(store.Event)) error
}

// claim is who has an address. Owner is the name of the container, where the
// address is to be kept for it. When such a container is gone the claim stays
// as one that no host has, of kindKept, with the time of that.
type claim struct {
	Version    int
	Kind       kind
	Host, Name string
	Owner      string `json:",omitempty"`
	Nonce      string
	Created    time.Time
	Released   time.Time `json:",omitzero"`
}

// heldClaim is a claim as it is in the store.
type heldClaim struct {
	claim
	rev uint64
}

// ownClaim is what a host remembers of a claim that it wrote.
type ownClaim struct {
	rev   uint64
	since time.Time
}

// heldError is the refusal of an address that another host has.
type heldError struct{ heldClaim }

func (e *heldError) Error() string {
	if e.Kind == kindGateway {
		return "is the gateway"
	}
	if e.Kind == kindKept {
		return "is kept for " + e.Owner
	}
	return "is held by host " + cmp.Or(e.Name, e.Host)
}

// Is makes it what a store says of such a record.
func (e *heldError) Is(target error) bool { return target == store.ErrExists }

// errOtherGateway: the hosts have just agreed on another one.
var errOtherGateway = errors.New("another host has given the pool another gateway meanwhile")

// errNoCluster is for pools that were made when there was one, too.
var errNoCluster = errors.New("address spaces of a cluster are kept in etcd: set STORE=etcd://host:2379 on every host")

// shared is the home of pools in the address spaces of a cluster, as this host
// sees it.
type shared struct {
	claims             // nil without a cluster
	disk       records // of this host
	host, name string  // its ID, and its name for people

	mu     sync.Mutex
	loaded bool // the pools of this host are known
	// doubt has the nonces of writes with an unknown outcome. Such a write may
	// still land, whatever is done meanwhile, and also if it was repeated and
	// that has succeeded: at the revision that is here, else 0.
	doubt map[string]uint64
	owed  map[string]bool // keys that are on disk as to be deleted
}

func (k poolKey) shared() bool { return strings.HasPrefix(k.space, spaceOption) }

// spaceName is the NAME of space=NAME.
func (k poolKey) spaceName() string { return strings.TrimPrefix(k.space, spaceOption) }

func (k poolKey) table() string { return spaceKeys + k.spaceName() + "/pools" }
func (k poolKey) claims() string {
	return spaceKeys + k.spaceName() + "/addr/" + k.prefix.String() + "/"
}

func (k poolKey) claim(a netip.Addr) string { return k.claims() + a.String() }

// owed is the key of a pool that has to be left.
func (k poolKey) owed() string { return spaceKeys + k.spaceName() + "/pool/" + k.prefix.String() }

// parseSpaceKey tells what a key is about: a table (only the space is set),
// a pool that has to be left (no address), or a claim.
func parseSpaceKey(key string) (k poolKey, a netip.Addr, ok bool) {
	rest, ok := strings.CutPrefix(key, spaceKeys)
	name, rest, found := strings.Cut(rest, "/")
	if !ok || !found || checkSpaceName(name) != nil {
		return poolKey{}, a, false
	}
	k.space = spaceOption + name
	if rest == "pools" {
		return k, a, true
	}
	kind, pool, _ := strings.Cut(rest, "/")
	var err error
	if kind == "addr" {
		at := strings.LastIndexByte(pool, '/')
		if a, err = netip.ParseAddr(pool[at+1:]); err != nil {
			return k, a, false
		}
		pool = pool[:max(at, 0)]
	}
	k.prefix, err = netip.ParsePrefix(pool)
	if err != nil || validPool(k.prefix) != nil || a.IsValid() && !k.prefix.Contains(a) {
		return k, a, false
	}
	return k, a, a.IsValid() && k.claim(a) == key || k.owed() == key
}

// putPool implements home: a reference of this host.
func (s *shared) putPool(ctx context.Context, p *pool, _ store.Batch) error {
	if err := s.forget(ctx, p.owed()); err != nil {
		return err
	}
	m := member{Name: s.name, SubPool: p.parts[0].sub, Nonce: rand.Text()}
	given, added := p.opts.raw, reservedTexts(p.added)
	err := s.change(ctx, p.poolKey, func(t *table) (bool, error) {
		for prefix, o := range t.Pools {
			if prefix != p.prefix && prefix.Overlaps(p.prefix) {
				return false, fmt.Errorf("subnet %s overlaps %s, which host %s has in space %s: give the same subnet on every host, or choose another space",
					p.prefix, prefix, o.names(), p.spaceName())
			}
		}
		tp := t.at(p.prefix)
		have, ok := tp.Hosts[s.host]
		changed, err := tp.agree(p, given, added, ok)
		tp.Hosts[s.host] = m
		return changed || !ok || have.Name != m.Name || have.SubPool != m.SubPool, err
	})
	if err == nil {
		p.rev = 1 // there is a record; which revision it has is not needed
	}
	return err
}

// dropPool implements home: it drops this host's reference and addresses, and
// with the last reference all that is left of the pool.
//
// That is written down first: a host that dies on the way goes on after it.
func (s *shared) dropPool(ctx context.Context, k poolKey) error {
	if err := s.owe(ctx, k.owed(), nil); err != nil {
		return err
	}
	if err := s.leave(ctx, k); err != nil {
		return err
	}
	return s.forget(ctx, k.owed())
}

func (s *shared) leave(ctx context.Context, k poolKey) error {
	if s.claims == nil {
		return errNoCluster
	}
	for {
		// Listed before the table is read: whoever has the pool when the
		// table changes cannot have written any of these revisions.
		list, err := s.List(ctx, k.claims())
		if err != nil {
			return err
		}
		last := false
		err = s.change(ctx, k, func(t *table) (bool, error) {
			p := t.at(k.prefix)
			_, had := p.Hosts[s.host]
			delete(p.Hosts, s.host)
			last = len(p.Hosts) == 0
			return had, nil
		})
		if err != nil {
			return err
		}
		n := 0
		for _, r := range list {
			if c := decodeClaim(r); !last && (c.Host != s.host || c.Kind == kindGateway) {
				continue
			}
			if err := s.Remove(ctx, r); err != nil && !errors.Is(err, store.ErrConflict) {
				return err
			}
			n++
		}
		if n == 0 {
			return nil
		}
	}
}

// putAddress implements home. A gateway is that of all hosts.
func (s *shared) putAddress(ctx context.Context, k poolKey, a netip.Addr, g grant, _ store.Batch) (uint64, error) {
	if s.claims == nil {
		return 0, errNoCluster
	}
	key := k.claim(a)
	takeOver := s.owes(key)
	if err := s.forget(ctx, key); err != nil {
		return 0, err
	}
	rev, err := s.claim(ctx, key, g.as, g.name, g.kept, takeOver)
	if err != nil || g.as != kindGateway {
		return rev, err
	}
	err = s.change(ctx, k, func(t *table) (bool, error) {
		switch p := t.at(k.prefix); {
		case len(p.Hosts) == 0:
			return false, errPoolGone
		case !p.Gateway.IsValid():
			p.Gateway, p.By = a, s.name
			return true, nil
		case p.Gateway != a:
			return false, errOtherGateway
		}
		return false, nil
	})
	if errors.Is(err, errOtherGateway) {
		if rerr := s.Remove(ctx, store.Record{Key: key, Rev: rev}); rerr != nil && !errors.Is(rerr, store.ErrConflict) {
			return 0, rerr
		}
	}
	return rev, err
}

// claim writes the record of an address, and goes on until the outcome is
// clear: the same record is written again until it is there or another one is.
func (s *shared) claim(ctx context.Context, key string, as kind, owner string, kept uint64, takeOver bool) (uint64, error) {
	c := claim{Version: recordVersion, Kind: as, Host: s.host, Name: s.name, Owner: owner, Nonce: rand.Text(), Created: time.Now().UTC()}
	v, err := json.Marshal(c)
	if err != nil {
		return 0, err
	}
	unsure, replace := false, kept
	for {
		r, err := s.Put(ctx, store.Record{Key: key, Value: v, Rev: replace})
		if err == nil {
			s.succeeded(c.Nonce, r.Rev)
			return r.Rev, nil
		}
		if errors.Is(err, store.ErrExists) && as == kindAuto && !unsure && !takeOver {
			return 0, err // the next one is as good
		}
		replace = 0
		if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
			var have store.Record
			if have, err = s.Get(ctx, key); err == nil {
				h := decodeClaim(have)
				switch {
				case h.Nonce == c.Nonce, s.mayHave(h, takeOver) && h.Owner == owner:
					s.succeeded(h.Nonce, h.rev)
					return h.rev, nil
				case s.mayHave(h, takeOver), h.Kind == kindKept && as != kindAuto:
					replace = h.rev
				case as == kindGateway && h.Kind == kindGateway:
					// Of a host that is just giving it up, or making it, too.
					// Written again it is not deleted by that one.
					replace = h.rev
				default:
					return 0, &heldError{h}
				}
			}
			if err == nil || errors.Is(err, store.ErrNotFound) {
				continue
			}
		}
		if errors.Is(err, store.ErrUncertain) {
			unsure = true
			s.doubts(c.Nonce)
			if s.pause(ctx) {
				continue
			}
		}
		if unsure {
			err = uncertain(err)
		}
		return 0, err
	}
}

// mayHave reports whether a claim to an address that this host has not is one
// that it wrote all the same, or was about to delete.
func (s *shared) mayHave(h heldClaim, takeOver bool) bool {
	return h.Host == s.host && (takeOver || s.doubted(h.Nonce))
}

// dropAddress implements home. It deletes a record of this host only, and
// exactly the one that it has read: what is deleted late is not another one.
// What fails is remembered, over a restart. What is done is forgotten at once:
// the address may be given out again.
func (s *shared) dropAddress(ctx context.Context, k poolKey, a netip.Addr, _ store.Batch) error {
	if err := s.unclaim(ctx, k.claim(a)); err != nil {
		return s.owe(ctx, k.claim(a), err)
	}
	return s.forget(ctx, k.claim(a))
}

// evict takes an address from another host, unless the claim has changed since it
// was read. A name keeps it.
func (s *shared) evict(ctx context.Context, k poolKey, a netip.Addr, h heldClaim) error {
	if s.claims == nil {
		return errNoCluster
	}
	err := s.letGo(ctx, store.Record{Key: k.claim(a), Rev: h.rev}, h.claim)
	if errors.Is(err, store.ErrConflict) {
		return fmt.Errorf("address %s of pool %s has just changed hands: look at it again", a, k.prefix)
	}
	return err
}

func (s *shared) unclaim(ctx context.Context, key string) error {
	if s.claims == nil {
		return errNoCluster
	}
	for {
		r, err := s.Get(ctx, key)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		c := decodeClaim(r)
		if c.Host != s.host || c.Kind == kindGateway {
			return nil
		}
		if err = s.letGo(ctx, r, c.claim); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
}

// letGo ends a claim as it was read: it goes, or is left to no host.
func (s *shared) letGo(ctx context.Context, r store.Record, c claim) error {
	if c.Owner == "" {
		return s.Remove(ctx, r)
	}
	c.Kind, c.Host, c.Name, c.Nonce, c.Released = kindKept, "", "", "", time.Now().UTC()
	return s.rewrite(ctx, r, c)
}

// rewrite replaces a claim as it was read. One that has changed since, or is
// gone, is a conflict.
func (s *shared) rewrite(ctx context.Context, r store.Record, c claim) error {
	var err error
	if r.Value, err = json.Marshal(c); err != nil {
		return err
	}
	if _, err = s.Put(ctx, r); errors.Is(err, store.ErrNotFound) {
		return store.ErrConflict
	}
	return err
}

// disown takes a name off the claim to the address that it keeps, and deletes
// the claim if that was all.
func (s *shared) disown(ctx context.Context, k poolKey, b binding) error {
	if s.claims == nil {
		return errNoCluster
	}
	for {
		r, err := s.Get(ctx, k.claim(b.Address))
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		c := decodeClaim(r)
		switch {
		case c.Owner != b.name:
			return nil
		case c.Kind == kindKept && !b.Released.IsZero() && c.Released.After(b.Released):
			return nil // for a container that was there since
		case c.Kind == kindKept:
			err = s.Remove(ctx, r)
		default:
			c.Owner = ""
			err = s.rewrite(ctx, r, c.claim)
		}
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
}

// decodeClaim reads a claim. One that cannot be read is that of nobody known:
// its address is taken all the same.
func decodeClaim(r store.Record) heldClaim {
	var c claim
	if decode(r.Key, r.Value, &c, &c.Version) != nil {
		c = claim{Name: "?"}
	}
	return heldClaim{c, r.Rev}
}

// pauseTime is between two writes of which the first had an unknown outcome.
const pauseTime = 100 * time.Millisecond

// pause reports whether there is time for another attempt.
func (s *shared) pause(ctx context.Context) bool {
	t := time.NewTimer(pauseTime)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func uncertain(err error) error {
	if errors.Is(err, store.ErrUncertain) {
		return err
	}
	return fmt.Errorf("%w: %w", store.ErrUncertain, err)
}

func (s *shared) doubts(nonce string) {
	if nonce == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doubt[nonce] = 0
}

// succeeded notes where a write has landed that had an unknown outcome.
func (s *shared) succeeded(nonce string, rev uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.doubt[nonce]; ok {
		s.doubt[nonce] = rev
	}
}

func (s *shared) doubted(nonce string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.doubt[nonce]
	return ok
}

// late reports whether a claim is one that has landed behind this host's back.
// News of one that it knows may be as late.
func (s *shared) late(h heldClaim) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.doubt[h.Nonce]
	return ok && h.rev > known
}

func (s *shared) owes(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owed[key]
}

// owe writes down that a key has to go; err is why it could not be deleted.
func (s *shared) owe(ctx context.Context, key string, err error) error {
	s.mu.Lock()
	s.owed[key] = true // also if the disk does not say whether it has it
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), oweTime)
	defer cancel()
	if _, derr := s.disk.Put(ctx, store.Record{Key: owedKeys + key}); derr != nil && !errors.Is(derr, store.ErrExists) {
		return errors.Join(err, derr)
	}
	return err
}

func (s *shared) forget(ctx context.Context, key string) error {
	if !s.owes(key) {
		return nil
	}
	if err := s.disk.Delete(ctx, owedKeys+key); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.owed, key)
	return nil
}

// The engine waits 10 s for an answer; what fails is written down within that.
const (
	sharedTime = 7 * time.Second
	oweTime    = 2 * time.Second
)
