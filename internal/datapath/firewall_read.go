package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// loadLocked reads the table back and sets have and sound accordingly. There
// is false when the kernel has no such table. What a damaged table still
// holds is added to what is remembered, so that rebuilding loses nothing.
func (f *firewall) loadLocked(deadline time.Time) (there bool, err error) {
	if err := f.sock.SetDeadline(deadline); err != nil {
		return false, err
	}
	f.sound = false
	tables, err := f.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	for _, t := range tables {
		there = there || t.Name == f.rs.table.Name
	}
	if !there {
		return false, nil
	}
	damage, err := f.damageLocked()
	if err != nil {
		return true, err
	}
	els, whole, err := f.elementsLocked()
	if err != nil {
		return true, err
	}
	if damage == "" && !whole {
		damage = "a set or an element is not one of ours"
	}
	if damage == "" {
		f.have, f.sound = els, true
		return true, nil
	}
	maps.Copy(f.have, els)
	f.log.WithField("damage", damage).Debug("nft table is not as it should be")
	return true, nil
}

// damageLocked names the first chain or rule that differs from the rule set,
// "" if none does.
func (f *firewall) damageLocked() (string, error) {
	all, err := f.conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	found := map[string]*nftables.Chain{}
	for _, c := range all {
		if c.Table.Name == f.rs.table.Name {
			found[c.Name] = c
		}
	}
	if len(found) != len(f.rs.chains) {
		return fmt.Sprintf("%d chains instead of %d", len(found), len(f.rs.chains)), nil
	}
	for _, want := range f.rs.chains {
		if c := found[want.Name]; c == nil || !sameChain(c, want) {
			return "chain " + want.Name, nil
		}
		rules, err := f.conn.GetRules(f.rs.table, want)
		if err != nil {
			return "", fmt.Errorf("list rules of %s: %w", want.Name, err)
		}
		if !f.sameRules(want.Name, rules) {
			return "rules of chain " + want.Name, nil
		}
	}
	return "", nil
}

func sameChain(c, want *nftables.Chain) bool {
	return c.Type == want.Type && samePtr(c.Hooknum, want.Hooknum) && samePtr(c.Priority, want.Priority) && samePtr(c.Policy, want.Policy)
}

func samePtr[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// sameRules compares the tags, which a rule that somebody changed has lost.
func (f *firewall) sameRules(chain string, rules []*nftables.Rule) bool {
	i := 0
	for n, r := range f.rs.rules {
		if r.chain != chain {
			continue
		}
		if i >= len(rules) || !bytes.Equal(rules[i].UserData, f.rs.tag(n)) {
			return false
		}
		i++
	}
	return i == len(rules)
}

// elementsLocked reads every set of ours whose form is the one we know. Whole
// is false if one is missing or of another form, or holds something that no
// Element describes. Sets that others add are not looked at: no rule uses them.
func (f *firewall) elementsLocked() (els map[Element]bool, whole bool, err error) {
	els, whole = map[Element]bool{}, true
	for _, d := range f.rs.sets {
		want := d.nft(f.rs.table)
		s, err := f.conn.GetSetByName(f.rs.table, d.name())
		if errors.Is(err, unix.ENOENT) {
			whole = false
			continue
		}
		if err != nil {
			return nil, false, fmt.Errorf("read set %s: %w", d.name(), err)
		}
		if !sameSet(s, want) {
			whole = false
			continue
		}
		raw, err := f.conn.GetSetElements(want)
		if err != nil {
			return nil, false, fmt.Errorf("list elements of %s: %w", d.name(), err)
		}
		some, ok := d.decode(raw)
		whole = whole && ok
		for _, e := range some {
			els[e] = true
		}
	}
	return els, whole, nil
}

func sameSet(s, want *nftables.Set) bool {
	return s.KeyType.GetNFTMagic() == want.KeyType.GetNFTMagic() && s.KeyType.Bytes == want.KeyType.Bytes &&
		s.DataType.GetNFTMagic() == want.DataType.GetNFTMagic() && s.DataType.Bytes == want.DataType.Bytes &&
		s.IsMap == want.IsMap && s.Interval == want.Interval && s.Concatenation == want.Concatenation
}
