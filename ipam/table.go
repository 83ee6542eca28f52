package ipam

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/store"
)

// table is all that the hosts have to agree on in a space. It is one record, so
// that what one of them decides on is still so when it writes.
type table struct {
	Version int
	Pools   map[netip.Prefix]*tablePool
}

type tablePool struct {
	Gateway netip.Addr        `json:",omitzero"` // once given, for as long as there is the pool
	By      string            `json:",omitempty"`
	Hosts   map[string]member // by host ID
	// Options and Reserved are those of all hosts, see poolRecord.
	Options  map[string]string `json:",omitempty"`
	Reserved map[string]string `json:",omitempty"`
}

// member is one host's reference to a pool.
type member struct {
	Name    string
	SubPool netip.Prefix `json:",omitzero"`
	Nonce   string       // of the write
}

func (t *table) at(prefix netip.Prefix) *tablePool {
	if t.Pools[prefix] == nil {
		t.Pools[prefix] = &tablePool{Hosts: map[string]member{}}
	}
	return t.Pools[prefix]
}

// agree has a host's pool and the table's be alike in their options and in what
// is reserved, and reports whether the table has changed. given and added are what
// the host would have. member: it has the pool already.
func (t *tablePool) agree(p *pool, given, added map[string]string, member bool) (changed bool, err error) {
	switch {
	case len(t.Hosts) == 0:
		t.Options, t.Reserved, changed = given, added, true
	case given == nil || maps.Equal(given, t.Options):
	case member && len(t.Hosts) == 1:
		t.Options, changed = given, true
	default:
		return false, fmt.Errorf("subnet %s in space %s: host %s has it with %s, and here it is to have %s: give the same --ipam-opt on every host, or only on the first",
			p.prefix, p.spaceName(), t.names(), optionsText(t.Options), optionsText(given))
	}
	return changed, p.adopt(t)
}

func optionsText(o map[string]string) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(o)) {
		all = append(all, k+"="+o[k])
	}
	return cmp.Or(strings.Join(all, ", "), "no options")
}

// adopt takes over what the hosts have agreed on; p.mu is held, or nobody else
// knows p.
func (p *pool) adopt(t *tablePool) error {
	o, err := parseOptions(t.Options, p.prefix)
	if err != nil {
		return err
	}
	added, err := parseReserved(t.Reserved, p.prefix)
	if err != nil {
		return err
	}
	p.opts, p.added = o, added
	return nil
}

func (t *tablePool) names() string {
	var names []string
	for id, m := range t.Hosts {
		names = append(names, cmp.Or(m.Name, id))
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// change changes the table of a space. f is called again when another host was
// quicker, or when the outcome of a write is unknown; it reports whether there
// is anything to write.
func (s *shared) change(ctx context.Context, k poolKey, f func(*table) (bool, error)) error {
	if s.claims == nil {
		return errNoCluster
	}
	unsure := false
	for {
		t, rev, err := s.readTable(ctx, k)
		if err == nil {
			changed, ferr := f(&t)
			if ferr != nil || !changed {
				return ferr
			}
			if err = s.writeTable(ctx, k, t, rev); errors.Is(err, store.ErrUncertain) {
				s.doubts(t.at(k.prefix).Hosts[s.host].Nonce)
			}
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrExists), errors.Is(err, store.ErrNotFound):
			continue
		case errors.Is(err, store.ErrUncertain) && s.pause(ctx):
			unsure = true
			continue
		case unsure:
			return uncertain(err)
		}
		return err
	}
}

func (s *shared) readTable(ctx context.Context, k poolKey) (t table, rev uint64, err error) {
	r, err := s.Get(ctx, k.table())
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return t, 0, err
	}
	if err == nil {
		t, err = decodeTable(r)
		return t, r.Rev, err
	}
	t, err = decodeTable(store.Record{})
	return t, 0, err
}

func (s *shared) writeTable(ctx context.Context, k poolKey, t table, rev uint64) error {
	for prefix, p := range t.Pools {
		if len(p.Hosts) == 0 {
			delete(t.Pools, prefix)
		}
	}
	r := store.Record{Key: k.table(), Rev: rev}
	if len(t.Pools) == 0 {
		return s.Remove(ctx, r)
	}
	var err error
	if r.Value, err = json.Marshal(t); err == nil {
		_, err = s.Put(ctx, r)
	}
	return err
}

// decodeTable reads a table; no record is an empty one.
func decodeTable(r store.Record) (table, error) {
	t := table{Version: recordVersion}
	if r.Value != nil {
		if err := decode(r.Key, r.Value, &t, &t.Version); err != nil {
			return t, err
		}
	}
	if t.Pools == nil {
		t.Pools = map[netip.Prefix]*tablePool{}
	}
	for prefix, p := range t.Pools {
		if p == nil {
			return t, fmt.Errorf("record %s: nothing about pool %s", r.Key, prefix)
		}
		if p.Hosts == nil {
			p.Hosts = map[string]member{}
		}
	}
	return t, nil
}

// shareReserved changes what is reserved in a shared space for all hosts. The
// caller holds changes.
func (i *IPAM) shareReserved(ctx context.Context, p *pool, change func(map[string]reservation) error) error {
	ctx, cancel := p.within(ctx)
	defer cancel()
	var next tablePool
	err := i.shared.change(ctx, p.poolKey, func(t *table) (bool, error) {
		tp := t.at(p.prefix)
		added, err := parseReserved(tp.Reserved, p.prefix)
		if err != nil {
			return false, err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.closed || len(tp.Hosts) == 0 {
			return false, errPoolGone
		}
		if err := change(added); err != nil {
			return false, err
		}
		tp.Reserved = reservedTexts(added)
		next = *tp
		return true, nil
	})
	if err != nil {
		return err
	}
	p.mu.Lock()
	err = p.adopt(&next)
	lost := p.reserve()
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)
	return err
}
