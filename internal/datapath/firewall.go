package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

const (
	// nftBuffer is the size of the socket's buffers. With the default ones
	// the kernel applies a transaction of some hundred messages and then has
	// no room for the answers (ENOBUFS), or refuses it (EMSGSIZE).
	nftBuffer = 16 << 20
	// nftTimeout bounds one transaction. The library waits for one answer per
	// message, and the kernel sends fewer when the commit itself fails.
	nftTimeout = 10 * time.Second
	// nftChunk is how many elements go into one message; the list of elements
	// is one netlink attribute and those end at 64 KiB.
	nftChunk = 256
)

// firewall owns the table inet weft: constant rules, and sets whose elements
// are what changes. It remembers the elements, so that a change costs the
// same whatever their number; owned compares that memory with the kernel.
type firewall struct {
	log logrus.FieldLogger
	rs  *ruleset
	ns  *namespace // for when the socket must be renewed

	mu   sync.Mutex // guards all below, and so orders the transactions
	conn *nftables.Conn
	sock *netlink.Conn // inside conn
	// have is what the table holds, or held before somebody damaged it.
	have map[Element]bool
	// sound is false while the table is known to be absent, of another
	// version, or damaged. The next change then builds it anew.
	sound bool
	// rebuilt is set until add has told about it.
	rebuilt bool
	// restored is told what a table holds that was built anew; nil: nobody is.
	// It must not block.
	restored func([]Element)
}

// newFirewall works on the network namespace of the calling thread. A table
// that is there already is taken over as it is, or, if another version made
// it, replaced at once with the same elements.
func newFirewall(log logrus.FieldLogger, table string) (*firewall, error) {
	rs, err := newRuleset(table)
	if err != nil {
		return nil, fmt.Errorf("nft table inet %s: %w", table, err)
	}
	ns, err := threadNamespace()
	if err != nil {
		return nil, fmt.Errorf("nft table inet %s: %w", table, err)
	}
	f := &firewall{log: log, rs: rs, ns: ns, have: map[Element]bool{}}
	if err := f.start(); err != nil {
		f.close()
		return nil, fmt.Errorf("nft table inet %s: %w", table, err)
	}
	return f, nil
}

func (f *firewall) start() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.dialLocked(); err != nil {
		return err
	}
	deadline := time.Now().Add(nftTimeout)
	there, err := f.loadLocked(deadline)
	if err != nil || !there || f.sound {
		return err
	}
	if err := f.rebuildLocked(deadline, f.have); err != nil {
		return err
	}
	f.sound = true
	f.log.WithField("version", f.rs.version).Info("replaced the nft table of another version")
	return nil
}

// dialLocked opens the socket if it is not open.
func (f *firewall) dialLocked() error {
	if f.conn != nil {
		return nil
	}
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(f.ns.fd()),
		nftables.WithSockOptions(func(c *netlink.Conn) error {
			f.sock = c
			return errors.Join(c.SetReadBuffer(nftBuffer), c.SetWriteBuffer(nftBuffer))
		}))
	if err != nil {
		return fmt.Errorf("open netfilter socket: %w", err)
	}
	f.conn = conn
	return nil
}

// hangUpLocked closes the socket. It is what follows any error: answers may
// still be under way and would be taken for those of the next request.
func (f *firewall) hangUpLocked() {
	if f.conn == nil {
		return
	}
	if err := f.conn.CloseLasting(); err != nil {
		f.log.WithError(err).Debug("closing the netfilter socket")
	}
	f.conn = nil
}

// close lets go of the socket. The table stays: the data plane outlives us.
func (f *firewall) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hangUpLocked()
	f.ns.close()
}

// add puts the elements that are missing into their sets, all or none, and
// returns a line for each, and one if the table had to be built.
func (f *firewall) add(ctx context.Context, els []Element) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	added, err := f.applyLocked(ctx, els, nil)
	if err != nil {
		return nil, err
	}
	var changed []string
	if f.rebuilt {
		changed = append(changed, "nft add table inet "+f.rs.table.Name)
		f.rebuilt = false
	}
	for _, e := range added {
		changed = append(changed, e.String())
	}
	return changed, nil
}

// remove takes the elements out, all or none. Those that are not there are
// not missed.
func (f *firewall) remove(ctx context.Context, els []Element) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.applyLocked(ctx, nil, els)
	return err
}

// owned reads the table back. It is empty when the table is not there or not
// as it should be; the next change then builds it anew.
func (f *firewall) owned(ctx context.Context) ([]Element, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.dialLocked(); err != nil {
		return nil, err
	}
	if _, err := f.loadLocked(deadline(ctx)); err != nil {
		f.hangUpLocked()
		return nil, fmt.Errorf("read nft table inet %s: %w", f.rs.table.Name, err)
	}
	if !f.sound {
		return nil, nil
	}
	var els []Element
	for e := range f.have {
		if e.Set != setGuard && e.Set != setLifted && e.Set != setUplinks {
			els = append(els, e)
		}
	}
	return els, nil
}

// setFamilies has a set hold the families given.
func (f *firewall) setFamilies(ctx context.Context, set Set, v4, v6 bool) error {
	var add []Element
	if v4 {
		add = append(add, Element{Set: set, Net: all4})
	}
	if v6 {
		add = append(add, Element{Set: set, Net: all6})
	}
	return f.replace(ctx, set, add)
}

var (
	all4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	all6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// setUplinks names the bridges that are the host's own way out, which are
// not taken for somebody's container network.
func (f *firewall) setUplinks(ctx context.Context, names []string) error {
	add := make([]Element, len(names))
	for i, n := range names {
		add[i] = Element{Set: setUplinks, Link: n}
	}
	return f.replace(ctx, setUplinks, add)
}

// replace makes add the whole content of a set.
func (f *firewall) replace(ctx context.Context, set Set, add []Element) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var del []Element
	for e := range f.have {
		if e.Set == set && !slices.Contains(add, e) {
			del = append(del, e)
		}
	}
	_, err := f.applyLocked(ctx, add, del)
	return err
}

// applyLocked makes one transaction of what is to be added and removed. If
// that fails because the table is not what it was, it looks at the table and
// tries once more. It returns what was added.
func (f *firewall) applyLocked(ctx context.Context, add, del []Element) ([]Element, error) {
	var added []Element
	for attempt := 0; ; attempt++ {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("change nft table inet %s: %w", f.rs.table.Name, err)
		}
		if err := f.dialLocked(); err != nil {
			return nil, err
		}
		missing, surplus := f.missingLocked(add), f.presentLocked(del)
		switch {
		case !f.sound:
			added = dedup(add) // whatever we remember, it is not there
		case attempt == 0:
			added = missing
		}
		if len(missing) == 0 && len(surplus) == 0 && (f.sound || len(add) == 0) {
			return added, nil
		}
		err := f.transactLocked(deadline(ctx), missing, surplus)
		if err == nil {
			return added, nil
		}
		if errors.Is(err, errElement) {
			return nil, err
		}
		f.hangUpLocked()
		if attempt > 0 {
			return nil, f.explainLocked(err, missing)
		}
		f.log.WithError(err).Debug("nft transaction failed, reading the table again")
		if lerr := f.dialLocked(); lerr != nil {
			return nil, errors.Join(err, lerr)
		}
		if _, lerr := f.loadLocked(deadline(ctx)); lerr != nil {
			f.hangUpLocked()
			return nil, fmt.Errorf("change nft table inet %s: %w", f.rs.table.Name, errors.Join(err, lerr))
		}
	}
}

// dedup leaves the first of equal elements.
func dedup(els []Element) []Element {
	seen := make(map[Element]bool, len(els))
	return slices.DeleteFunc(slices.Clone(els), func(e Element) bool {
		known := seen[e]
		seen[e] = true
		return known
	})
}

func (f *firewall) missingLocked(els []Element) []Element {
	return slices.DeleteFunc(dedup(els), func(e Element) bool { return f.have[e] })
}

func (f *firewall) presentLocked(els []Element) []Element {
	return slices.DeleteFunc(dedup(els), func(e Element) bool { return !f.have[e] })
}

// transactLocked adds and removes in one transaction, and remembers it.
func (f *firewall) transactLocked(deadline time.Time, add, del []Element) error {
	if !f.sound {
		want := maps.Clone(f.have)
		for _, e := range del {
			delete(want, e)
		}
		for _, e := range add {
			want[e] = true
		}
		if err := f.rebuildLocked(deadline, want); err != nil {
			return err
		}
		f.have, f.sound, f.rebuilt = want, true, true
		if f.restored != nil {
			f.restored(slices.Collect(maps.Keys(want)))
		}
		return nil
	}
	less, err := f.encode(del)
	if err != nil {
		return err
	}
	more, err := f.encode(add)
	if err != nil {
		return err
	}
	// Removed first: a map's key may get another value in one transaction.
	if err := f.queueLocked(less, f.conn.SetDeleteElements); err != nil {
		return err
	}
	if err := f.queueLocked(more, f.conn.SetAddElements); err != nil {
		return err
	}
	if err := f.flushLocked(deadline); err != nil {
		return err
	}
	for _, e := range del {
		delete(f.have, e)
	}
	for _, e := range add {
		f.have[e] = true
	}
	return nil
}

// rebuildLocked replaces the table, in one transaction, with one that holds
// exactly these elements. Packets meet the old or the new one.
func (f *firewall) rebuildLocked(deadline time.Time, want map[Element]bool) error {
	els, err := f.encode(slices.Collect(maps.Keys(want)))
	if err != nil {
		return err
	}
	f.conn.AddTable(f.rs.table) // or deleting it fails where there is none
	f.conn.DelTable(f.rs.table)
	f.conn.AddTable(f.rs.table)
	for _, c := range f.rs.chains {
		f.conn.AddChain(c)
	}
	for _, d := range f.rs.sets {
		if err := f.conn.AddSet(d.nft(f.rs.table), nil); err != nil {
			return fmt.Errorf("set %s: %w", d.name(), err)
		}
	}
	if err := f.queueLocked(els, f.conn.SetAddElements); err != nil {
		return err
	}
	for n, r := range f.rs.rules {
		f.conn.AddRule(&nftables.Rule{Table: f.rs.table, Chain: &nftables.Chain{Name: r.chain}, Exprs: r.exprs, UserData: f.rs.tag(n)})
	}
	return f.flushLocked(deadline)
}

// errElement marks an element that was refused before the kernel saw it.
var errElement = errors.New("not usable")

// encode sorts the elements into their sets, in the kernel's form.
func (f *firewall) encode(els []Element) (map[lookup][]nftables.SetElement, error) {
	bySet := map[lookup][]nftables.SetElement{}
	for _, e := range els {
		d, ok := f.rs.bySet[lookupOf(e)]
		if !ok {
			return nil, fmt.Errorf("%v: no such set: %w", e, errElement)
		}
		encoded, err := d.encode(e)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errElement)
		}
		bySet[d.lookup()] = append(bySet[d.lookup()], encoded...)
	}
	return bySet, nil
}

// queueLocked appends elements to the transaction, in pieces.
func (f *firewall) queueLocked(bySet map[lookup][]nftables.SetElement, queue func(*nftables.Set, []nftables.SetElement) error) error {
	for l, encoded := range bySet {
		set := f.rs.bySet[l].nft(f.rs.table)
		for piece := range slices.Chunk(encoded, nftChunk) {
			if err := queue(set, piece); err != nil {
				return fmt.Errorf("set %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

func (f *firewall) flushLocked(deadline time.Time) error {
	if err := f.sock.SetDeadline(deadline); err != nil {
		return err
	}
	return f.conn.Flush()
}

// explainLocked names what is in the way of an element, where the kernel
// only says that something exists.
func (f *firewall) explainLocked(err error, missing []Element) error {
	if errors.Is(err, unix.EEXIST) {
		for _, m := range missing {
			for h := range f.have {
				if inTheWay(f.rs.bySet[lookupOf(m)], m, h) {
					return fmt.Errorf("%v: %v is there already: %w", m, h, err)
				}
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%v (%d in all): %w", missing[0], len(missing), err)
	}
	return fmt.Errorf("change nft table inet %s: %w", f.rs.table.Name, err)
}

// inTheWay reports whether m and h cannot both be in the set: the same key
// with other data, or overlapping intervals.
func inTheWay(d setDef, m, h Element) bool {
	if lookupOf(h) != d.lookup() || m.Link != h.Link || d.set == SetBeside && m.To != h.To {
		return false
	}
	if d.ranged {
		return m.Net.Overlaps(h.Net) && m.Proto == h.Proto && m.Port <= h.Port+h.More && h.Port <= m.Port+m.More
	}
	if d.interval() {
		return m.Net.Overlaps(h.Net)
	}
	return m.Out == h.Out && m.Net == h.Net && m.Proto == h.Proto && m.Port == h.Port
}

// deadline is that of ctx, but never further away than nftTimeout.
func deadline(ctx context.Context) time.Time {
	limit := time.Now().Add(nftTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		return d
	}
	return limit
}

// families reports which ones a set has, by us or by the process before us.
func (f *firewall) families(set Set) (v4, v6 bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.have[Element{Set: set, Net: all4}], f.have[Element{Set: set, Net: all6}]
}
