package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// binding is the record of a name that keeps an address of a pool, whether a
// container of that name runs or not. In a shared space it has no record of its
// own: the claim to the address has the name.
type binding struct {
	Version  int
	Address  netip.Addr
	Released time.Time `json:",omitzero"` // zero while it is held

	name string
	rev  uint64 // of the record, or of the claim; 0: there is none, or nobody knows which
}

// mostKept bounds how many names without a container a pool remembers: engines
// make up a new one for every container that is given none.
const mostKept = 4096

func (k poolKey) names() string            { return namePrefix + k.space + "," + k.prefix.String() + "/" }
func (k poolKey) name(name string) string  { return k.names() + name }
func (k poolKey) named() bool              { return k.space != GlobalSpace }
func (p *pool) reserved(a netip.Addr) bool { return p.reservedFor[a] != "" }

// task is how swarm names the container of a task: SERVICE.SLOT.ID, or
// SERVICE.NODE.ID where each node has one. The ID is new every time.
var task = regexp.MustCompile(`^(.+\.(?:[0-9]+|[0-9a-z]{25}))\.[0-9a-z]{25}$`)

// fixedName is what an address is kept for that was asked for by number, without
// a name: itself. No container's name has a space.
func fixedName(a netip.Addr) string { return fixedPrefix + a.String() }

const fixedPrefix = NoName + " "

// asked reports whether an address is kept for who asks for it by number; p.mu is
// held.
func (p *pool) asked(a netip.Addr) bool {
	b := p.byAddr[a]
	return b != nil && strings.HasPrefix(b.name, fixedPrefix)
}

// fixes reports whether an address that is asked for is to be kept: a stopped
// container would not start if another had it. Those of a swarm's tasks the leader
// keeps apart.
func (i *IPAM) fixes(p *pool, r addressRequest) bool {
	if r.kind != kindExplicit || !p.named() || p.dhcp() != "" {
		return false
	}
	id, held := i.holder(p.prefix)
	return !held || !swarm(id)
}

// lasting is the part of a container's name that its successor has too, or
// nothing if it is not a name.
func lasting(name string) string {
	name = strings.TrimPrefix(name, "/")
	if m := task.FindStringSubmatch(name); m != nil {
		name = m[1]
	}
	if checkName(name) != nil {
		return ""
	}
	return name
}

// reservation returns what is reserved for a name; p.mu is held.
func (p *pool) reservation(name string) (reservation, bool) {
	r, ok := p.added[name]
	if !ok {
		r, ok = p.opts.reserved[name]
	}
	return r, ok
}

// reservations are all of them by name; p.mu is held.
func (p *pool) reservations() map[string]reservation {
	all := map[string]reservation{}
	maps.Copy(all, p.opts.reserved)
	maps.Copy(all, p.added)
	return all
}

// reserve makes what is reserved what the options and the command say; p.mu is
// held, or nobody else knows p. Names that had one of the addresses lose it.
func (p *pool) reserve() (lost []binding) {
	for a := range p.reservedFor {
		delete(p.reservedFor, a)
		p.taken.wake(a)
	}
	for name, r := range p.reservations() {
		for _, b := range []*binding{p.byAddr[r.addr], p.byName[name]} {
			if b != nil {
				lost = append(lost, p.unbind(b))
				p.woken(b.Address)
			}
		}
		delete(p.since, r.addr)
		p.reservedFor[r.addr] = name
		p.taken.rest(r.addr)
	}
	return lost
}

// unbind forgets a name; p.mu is held.
func (p *pool) unbind(b *binding) binding {
	if p.byName[b.name] == b {
		delete(p.byName, b.name)
	}
	if p.byAddr[b.Address] == b {
		delete(p.byAddr, b.Address)
	}
	return *b
}

// wish is what a name has a right to; p.mu is held. reserved: the user has said
// so. second: a container of that name has it already.
func (p *pool) wish(name string) (a netip.Addr, reserved, second bool) {
	r, reserved := p.reservation(name)
	if reserved {
		a = r.addr
	} else if b := p.byName[name]; b != nil {
		a = b.Address
	}
	return a, reserved, a.IsValid() && p.taken.has(a) && !p.stale.has(a)
}

// call works out what a request with a name asks for. It may set the address,
// and it clears the name where the address is not to be kept for it.
func (i *IPAM) call(ctx context.Context, p *pool, r *addressRequest) (reserved bool, err error) {
	fixes := i.fixes(p, *r) // not under the lock: it asks the driver
	p.mu.Lock()
	lost := p.expire(i.now())
	defer func() { i.forgetNames(ctx, p, lost) }()
	defer p.mu.Unlock()
	if len(p.reservedFor) > 0 && r.name == "" && r.kind == kindAuto {
		i.nameless.Do(func() {
			i.log.Warn("this engine does not say which container an address is for (Docker 29 and later do): what is reserved for a name is given to nobody unless it is asked for, with ip: or --ip")
		})
	}
	if b := p.byName[r.name]; b != nil {
		r.had = b.Address
	}
	if r.want.IsValid() {
		if owner := p.reservedFor[r.want]; owner != "" && r.name != "" && r.name != owner {
			return false, p.othersName(r.want, owner)
		}
		if b := p.byName[r.name]; b != nil && b.Address != r.want && p.taken.has(b.Address) {
			r.name = "" // another container of that name runs
		}
		if fixes && r.name == "" && p.opts.keep != 0 && !p.reserved(r.want) {
			r.name = fixedName(r.want)
		}
		return false, nil
	}
	if r.name == "" {
		return false, nil
	}
	a, reserved, second := p.wish(r.name)
	switch {
	case second:
		i.log.WithField("pool", p.prefix.String()).Warnf("address %s is kept for %s and a container of that name has it: this one is given another", a, r.name)
		r.name = ""
	case !reserved && p.apart(r.id, a):
		r.name = "" // the name is that of a container of the other network as well
	case a.IsValid() && !reserved && r.elsewhere(a):
		i.log.WithField("pool", p.prefix.String()).Warnf("address %s is kept for %s and a container of another host has it: this one is given another", a, r.name)
		r.name = ""
	case a.IsValid():
		r.want, r.kind = a, kindNamed
		return reserved, nil
	case p.opts.keep == 0:
		r.name = ""
	}
	return false, nil
}

func (p *pool) othersName(a netip.Addr, owner string) error {
	return fmt.Errorf("address %s of pool %s is reserved for %s: take another, or `weft address forget %s`", a, p.prefix, owner, owner)
}

// binds reports whether an address that a name is given is to be kept for it
// because of that; p.mu is held.
func (p *pool) binds(name string, a netip.Addr) bool {
	_, reserved := p.reservation(name)
	return name != "" && !reserved && !p.reserved(a) && p.opts.keep != 0
}

// bind notes that a name has been given an address, which is taken, and ends
// its rest. What cannot be written is only not known after a restart.
// In a shared space it is in the claim, and known already if that was heard of;
// what the name had before goes.
func (i *IPAM) bind(ctx context.Context, p *pool, a netip.Addr, r addressRequest) {
	name := r.name
	p.mu.Lock()
	p.woken(a)
	var lost []binding
	if b := p.byAddr[a]; b != nil && b.name != name {
		lost = append(lost, p.unbind(b))
	}
	if !p.binds(name, a) {
		p.mu.Unlock()
		i.forgetNames(ctx, p, lost)
		return
	}
	b := p.byName[name]
	if b == nil {
		b = &binding{Version: recordVersion, name: name}
		p.byName[name] = b
	}
	known := b.Address == a && b.rev != 0
	if b.Address.IsValid() && b.Address != a {
		delete(p.byAddr, b.Address)
		p.woken(b.Address)
	}
	b.Address, b.Released = a, time.Time{}
	if p.shared() {
		b.rev = p.mine[a].rev
		if r.had.IsValid() && r.had != a {
			if o := p.byAddr[r.had]; o != nil && o.name == name {
				p.unbind(o)
				p.woken(r.had)
			}
			lost = append(lost, binding{name: name, Address: r.had})
		}
	}
	p.byAddr[a] = b
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)
	if !known { // else the record is right in all that matters
		i.saveName(ctx, p, name)
	}
}

// released writes down when the address of a name was, for the order in which
// they are given up; p.mu is not held.
func (i *IPAM) released(ctx context.Context, p *pool, a netip.Addr) {
	p.mu.Lock()
	b := p.byAddr[a]
	name, lost := "", []binding{}
	if b != nil {
		name = b.name
	}
	for len(p.byName) > mostKept {
		r, ok := p.front(&p.kept)
		if !ok {
			break
		}
		lost = append(lost, p.unbind(p.byAddr[r.addr]))
		p.woken(r.addr)
	}
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)
	if name != "" {
		i.saveName(ctx, p, name)
	}
}

// saveName writes what is known of a name.
func (i *IPAM) saveName(ctx context.Context, p *pool, name string) {
	if p.shared() {
		return
	}
	err := i.putName(ctx, p, name)
	if err != nil {
		i.log.WithField("pool", p.prefix.String()).WithError(err).Warnf("it could not be written down that %s keeps its address; a restart of the plugin forgets it", name)
	}
}

func (i *IPAM) putName(ctx context.Context, p *pool, name string) error {
	for range 3 {
		p.mu.Lock()
		b := p.byName[name]
		if b == nil || p.closed {
			p.mu.Unlock()
			return nil
		}
		v, err := json.Marshal(b)
		rev := b.rev
		p.mu.Unlock()
		if err != nil {
			return err
		}
		r, err := i.store.Put(ctx, store.Record{Key: p.name(name), Value: v, Rev: rev})
		switch {
		case err == nil:
			rev = r.Rev
		case errors.Is(err, store.ErrExists), errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrNotFound):
			if rev, err = i.revision(ctx, p.name(name)); err != nil {
				return err
			}
			err = errors.ErrUnsupported // again
		default:
			rev = 0
		}
		p.mu.Lock()
		if b := p.byName[name]; b != nil {
			b.rev = rev
		}
		p.mu.Unlock()
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return nil
}

// revision reads the revision of the record under a key; 0 is none.
func (i *IPAM) revision(ctx context.Context, key string) (uint64, error) {
	list, err := i.store.List(ctx, key)
	for _, r := range list {
		if r.Key == key {
			return r.Rev, err
		}
	}
	return 0, err
}

// forgetNames deletes records of names. One that stays is found to be void by
// the next start, as long as somebody else has the address.
func (i *IPAM) forgetNames(ctx context.Context, p *pool, lost []binding) {
	for _, b := range lost {
		if err := i.dropName(ctx, p, b); err != nil {
			i.log.WithField("pool", p.prefix.String()).WithError(err).Debug("the record of a name was not deleted")
			continue
		}
		p.mu.Lock()
		again := p.byName[b.name] != nil
		p.mu.Unlock()
		if again { // given an address meanwhile, by another request
			i.saveName(ctx, p, b.name)
		}
	}
}

// dropName deletes what is written of a name.
func (i *IPAM) dropName(ctx context.Context, p *pool, b binding) error {
	if p.shared() {
		return i.shared.disown(ctx, p.poolKey, b)
	}
	return i.store.Delete(ctx, p.name(b.name))
}

// loadNames reads which names keep which addresses. holders are the names that
// the records of addresses have.
func (i *IPAM) loadNames(ctx context.Context, pools map[poolKey]*pool, holders map[*pool]map[netip.Addr]string) error {
	list, err := i.store.List(ctx, namePrefix)
	if err != nil {
		return err
	}
	orphans := map[poolKey]bool{}
	for _, r := range list {
		b := &binding{rev: r.Rev}
		if err := decode(r.Key, r.Value, b, &b.Version); err != nil {
			return err
		}
		at := strings.LastIndexByte(r.Key, '/')
		id, err := parsePoolID(strings.TrimPrefix(r.Key[:max(at, len(namePrefix))], namePrefix))
		if err != nil || !id.prefix.Contains(b.Address) {
			return fmt.Errorf("record %s: it is not that of a name in a pool", r.Key)
		}
		b.name = r.Key[at+1:]
		p := pools[id.poolKey]
		if p == nil {
			orphans[id.poolKey] = true
			continue
		}
		holder, taken := holders[p][b.Address]
		if taken && holder != b.name || p.reserved(b.Address) || p.byAddr[b.Address] != nil {
			if err := i.store.Delete(ctx, r.Key); err != nil {
				return err
			}
			continue // somebody else has been given it
		}
		p.byName[b.name], p.byAddr[b.Address] = b, b
		if taken {
			b.Released = time.Time{}
		} else {
			if b.Released.IsZero() { // when the process died it was just being released
				b.Released = i.now()
			}
			p.kept = append(p.kept, release{b.Address, b.Released})
			p.since[b.Address] = b.Released
			p.taken.rest(b.Address)
		}
	}
	for _, p := range pools {
		slices.SortFunc(p.kept, func(a, b release) int { return a.at.Compare(b.at) })
	}
	for k := range orphans {
		if err := i.store.DeletePrefix(ctx, k.names()); err != nil {
			return err
		}
	}
	return nil
}
