package ipam

import "fmt"

// exhausted says what there is of addresses, and where; p.mu is held.
func (p *pool) exhausted(r addressRequest) error {
	far := p.away(r)
	if id := r.id; id.sub.IsValid() {
		where := ""
		if far > 0 {
			where = fmt.Sprintf(", %d of them on other hosts", far)
		}
		return fmt.Errorf("no free address left in %s of pool %s: all %s are in use%s: remove a container, give --ip, or make the network with a larger --ip-range", id.sub, p.prefix, count(id.auto()), where)
	}
	also := ""
	if far > 0 {
		also = fmt.Sprintf(", and %d on other hosts", far)
	}
	if n := len(p.reservedFor); n > 0 {
		also += fmt.Sprintf(", and %d are reserved", n)
	}
	return fmt.Errorf("no free address left in pool %s: %d of %s are in use%s: remove a container, or make the network with a larger --subnet", p.prefix, p.taken.len(), p.size(), also)
}

// away is how many addresses are free here and another host's; p.mu is held, and no
// address is free for r.
func (p *pool) away(r addressRequest) (n int) {
	first, last := r.id.auto()
	for {
		a, ok := p.taken.next(first, last)
		if !ok {
			return n
		}
		if r.elsewhere(a) {
			n++
		}
		if first = a.Next(); last.Less(first) || !first.IsValid() {
			return n
		}
	}
}
