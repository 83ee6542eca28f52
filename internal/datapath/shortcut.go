package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// shortcutTries is how often a change is worked out anew: what was read may be
// gone when it is changed, since the kernel deletes the chain of a link with the
// link.
const shortcutTries = 3

// Key is what identifies the Shortcut in the kernel: a hook is the chain of its
// link, an entry has its map and its MAC, whatever it leads to.
func (s Shortcut) Key() Shortcut {
	k := Shortcut{Tunnel: s.Tunnel, Link: s.Link, MAC: s.MAC}
	switch {
	case s.hook():
		k.Tunnel = ""
	case s.Link != s.Tunnel:
		k.Link = ""
	}
	return k
}

// hook reports whether it looks frames up, or else is what they are looked up in.
func (s Shortcut) hook() bool { return s.MAC == MAC{} }

// shortcutMap is a map of a tunnel: of what is on this host, for what comes in by
// the tunnel, or of what is on others, for what containers send.
type shortcutMap struct {
	tunnel string
	here   bool
}

func (m shortcutMap) name() string {
	if m.here {
		return "here_" + m.tunnel
	}
	return "away_" + m.tunnel
}

// table is the map that a hook looks into, or that an entry is in.
func (s Shortcut) table() shortcutMap {
	return shortcutMap{s.Tunnel, s.hook() == (s.Link == s.Tunnel)}
}

// shortcuts owns the table netdev weft. For each tunnel there are two maps, from
// a hardware address to the number of a link; for each hook there is a chain of
// the link's name with one rule. One chain for all links would do with less, but
// before Linux 6.4 a chain gets all its links when it is made.
//
// Nothing is remembered: a change asks for the objects that it is about, each by
// its name, so that it costs the same whatever their number.
type shortcuts struct {
	log   logrus.FieldLogger
	table string     // its name
	ns    *namespace // the firewall's
	probe string     // a link that is always there; tests have others

	mu   sync.Mutex // guards what follows, and orders the transactions
	conn *netlink.Conn
	can  *bool // nil: not asked yet
}

func newShortcuts(log logrus.FieldLogger, table string, ns *namespace) *shortcuts {
	return &shortcuts{log: log, table: table, ns: ns, probe: "lo"}
}

func (s *shortcuts) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hangUpLocked()
}

// usableLocked asks the kernel once whether it has all that is needed. What
// it makes for that, it takes back in the same transaction.
func (s *shortcuts) usableLocked(until time.Time) bool {
	if s.can != nil {
		return *s.can
	}
	const table = tableName + ".probe" // no instance has a name with a dot
	var b nfBatch
	b.table(table, unix.NFT_MSG_NEWTABLE)
	b.set(table, shortcutMap{"probe", true})
	b.chain(table, s.probe)
	b.rule(table, s.probe, shortcutMap{"probe", true})
	b.table(table, unix.NFT_MSG_DELTABLE)
	err := s.commitLocked(until, b)
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM) {
		return false // that is no answer: it is asked again the next time
	}
	can := err == nil
	s.can = &can
	if !can {
		s.log.WithError(err).Warn("no shortcuts past the bridges of overlay networks: the kernel lacks nft_fwd_netdev; they work without, more slowly where bridge netfilter is on")
	}
	return can
}

// ensure makes shortcuts or mends them. Where the kernel has none there is
// nothing to do: frames take the bridge.
func (s *shortcuts) ensure(ctx context.Context, list []Shortcut, index func(string) (int, error), d *done) error {
	if len(list) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.usableLocked(deadline(ctx)) {
		return nil
	}
	var made []Shortcut
	var mended int
	err := s.changeLocked(ctx, func(until time.Time) (b nfBatch, err error) {
		b, made, mended, err = s.additionsLocked(until, list, index)
		return b, err
	})
	if err != nil {
		return fmt.Errorf("make shortcuts of %s: %w", list[0].Tunnel, err)
	}
	d.made.Shortcuts = append(d.made.Shortcuts, made...)
	if n := len(made) + mended; n > 0 {
		d.say("nft table netdev %s: %d shortcuts past the bridge", s.table, n)
	}
	return nil
}

// changeLocked carries out what plan finds to be done.
func (s *shortcuts) changeLocked(ctx context.Context, plan func(until time.Time) (nfBatch, error)) (err error) {
	for range shortcutTries {
		if err := ctx.Err(); err != nil {
			return err
		}
		until := deadline(ctx)
		var b nfBatch
		if b, err = plan(until); err != nil {
			return err
		}
		if err = s.commitLocked(until, b); err == nil {
			return nil
		}
	}
	return err
}

// additionsLocked is what list lacks, table and maps included.
func (s *shortcuts) additionsLocked(until time.Time, list []Shortcut, index func(string) (int, error)) (b nfBatch, made []Shortcut, mended int, err error) {
	b.table(s.table, unix.NFT_MSG_NEWTABLE)
	begun := map[string]bool{}
	begin := func(tunnel string) {
		if !begun[tunnel] {
			begun[tunnel] = true
			b.set(s.table, shortcutMap{tunnel, true})
			b.set(s.table, shortcutMap{tunnel, false})
		}
	}
	for _, x := range list {
		var there, right bool
		// Newer kernels take a hook for a link that is still to come.
		number, err := index(x.Link)
		if err != nil {
			return b, nil, 0, fmt.Errorf("%s: %s %w", x, x.Link, err)
		}
		have := 0
		if x.hook() {
			there, right, err = s.hookLocked(until, x)
		} else if have, there, err = s.entryLocked(until, x); have == number {
			right = true
		}
		if err != nil {
			return b, nil, 0, err
		}
		if there && right {
			continue
		}
		begin(x.Tunnel)
		switch {
		case x.hook() && there:
			b.drop(s.table, unix.NFT_MSG_DELCHAIN, x.Link)
		case there:
			b.element(s.table, unix.NFT_MSG_DELSETELEM, x.table(), x.MAC, 0)
		}
		if x.hook() {
			b.chain(s.table, x.Link)
			b.rule(s.table, x.Link, x.table())
		} else {
			b.element(s.table, unix.NFT_MSG_NEWSETELEM, x.table(), x.MAC, number)
		}
		if there {
			mended++
		} else {
			made = append(made, x)
		}
	}
	if len(begun) == 0 {
		return nfBatch{}, nil, 0, nil
	}
	return b, made, mended, nil
}

// remove takes shortcuts away, the maps of a tunnel with the tunnel's own hook,
// and the table with the last of them.
func (s *shortcuts) remove(ctx context.Context, list []Shortcut) error {
	if len(list) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.usableLocked(deadline(ctx)) {
		return nil
	}
	last := false
	err := s.changeLocked(ctx, func(until time.Time) (b nfBatch, err error) {
		b, last, err = s.removalsLocked(until, list)
		return b, err
	})
	if err == nil && last {
		err = s.changeLocked(ctx, s.emptyLocked)
	}
	if err != nil {
		return fmt.Errorf("remove shortcuts of %s: %w", list[0].Tunnel, err)
	}
	return nil
}

// removalsLocked is what there is of list. Chains come first, for no map goes
// while a rule looks into it.
func (s *shortcuts) removalsLocked(until time.Time, list []Shortcut) (b nfBatch, last bool, err error) {
	var going []string
	for _, x := range list {
		if !x.hook() {
			continue
		}
		there, _, err := s.hookLocked(until, x)
		if err != nil {
			return b, false, err
		}
		if there {
			b.drop(s.table, unix.NFT_MSG_DELCHAIN, x.Link)
		}
		if x.Link == x.Tunnel {
			going = append(going, x.Tunnel)
		}
	}
	for _, x := range list {
		if x.hook() || slices.Contains(going, x.Tunnel) {
			continue
		}
		_, there, err := s.entryLocked(until, x)
		if err != nil {
			return b, false, err
		}
		if there {
			b.element(s.table, unix.NFT_MSG_DELSETELEM, x.table(), x.MAC, 0)
		}
	}
	for _, t := range going {
		for _, from := range []bool{true, false} {
			m := shortcutMap{t, from}
			there, err := s.thereLocked(until, unix.NFT_MSG_GETSET, m.name())
			if err != nil {
				return b, false, err
			}
			if there {
				b.drop(s.table, unix.NFT_MSG_DELSET, m.name())
			}
		}
	}
	return b, len(going) > 0, nil
}

// emptyLocked is the removal of the table if nothing is in it.
func (s *shortcuts) emptyLocked(until time.Time) (b nfBatch, err error) {
	there, err := s.thereLocked(until, unix.NFT_MSG_GETTABLE, "")
	if err != nil || !there {
		return b, err
	}
	sets, err := s.setsLocked(until)
	if err != nil {
		return b, err
	}
	chains, err := s.chainsLocked(until)
	if err != nil {
		return b, err
	}
	if len(sets) == 0 && len(chains) == 0 {
		b.table(s.table, unix.NFT_MSG_DELTABLE)
	}
	return b, nil
}

// hookLocked asks whether there is a chain of the link's name, and whether it
// is as it should be.
func (s *shortcuts) hookLocked(until time.Time, x Shortcut) (there, right bool, err error) {
	msg, err := s.getLocked(until, unix.NFT_MSG_GETCHAIN, x.Link)
	if errors.Is(err, unix.ENOENT) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	c, err := parseNfChain(msg)
	if err != nil {
		return false, false, err
	}
	rules, err := s.rulesLocked(until, x.Link)
	if err != nil {
		return false, false, err
	}
	c.rules = rules[x.Link]
	return true, c.right() && c.tunnel() == x.Tunnel, nil
}

// entryLocked asks for the number of the link that an entry leads to.
func (s *shortcuts) entryLocked(until time.Time, x Shortcut) (number int, there bool, err error) {
	var b nfBatch
	b.element(s.table, unix.NFT_MSG_GETSETELEM, x.table(), x.MAC, 0)
	msgs, err := s.askLocked(until, b)
	if errors.Is(err, unix.ENOENT) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	els, err := parseNfElements(msgs)
	number, there = els[x.MAC]
	return number, there, err
}

func (s *shortcuts) thereLocked(until time.Time, kind int, name string) (bool, error) {
	_, err := s.getLocked(until, kind, name)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// owned reads the table back; names are the host's links by their number. Can is
// false where the kernel has no shortcuts.
func (s *shortcuts) owned(ctx context.Context, names map[int]string) (list []Shortcut, can bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.can != nil && !*s.can {
		return nil, false, nil
	}
	until := deadline(ctx)
	if list, err = s.ownedLocked(until, names); err != nil {
		s.hangUpLocked()
		return nil, true, fmt.Errorf("read nft table netdev %s: %w", s.table, err)
	}
	return list, true, nil
}

func (s *shortcuts) ownedLocked(until time.Time, names map[int]string) ([]Shortcut, error) {
	there, err := s.thereLocked(until, unix.NFT_MSG_GETTABLE, "")
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // the kernel lacks the family
	}
	if err != nil || !there {
		return nil, err
	}
	chains, err := s.chainsLocked(until)
	if err != nil {
		return nil, err
	}
	rules, err := s.rulesLocked(until, "")
	if err != nil {
		return nil, err
	}
	maps, err := s.setsLocked(until)
	if err != nil {
		return nil, err
	}
	var list []Shortcut
	hooked := map[string]bool{}
	for _, c := range chains {
		c.rules = rules[c.name]
		hooked[c.name] = true
		list = append(list, Shortcut{Tunnel: c.tunnel(), Link: c.name, Altered: !c.right()})
	}
	for _, m := range maps {
		if !hooked[m.tunnel] { // they go with the tunnel's hook
			hooked[m.tunnel] = true
			list = append(list, Shortcut{Tunnel: m.tunnel, Link: m.tunnel, Altered: true})
		}
		els, err := s.elementsLocked(until, m)
		if err != nil {
			return nil, err
		}
		for mac, n := range els {
			x := Shortcut{Tunnel: m.tunnel, Link: names[n], MAC: mac}
			if x.table() != m { // the link is gone, or is where frames come from
				x.Altered, x.Link = true, ""
				if !m.here {
					x.Link = m.tunnel
				}
			}
			list = append(list, x)
		}
	}
	return list, nil
}
