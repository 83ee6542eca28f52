package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft/internal/store"
)

// peerStore keeps the hosts that were there once. *store.Bolt satisfies it.
type peerStore interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Delete(ctx context.Context, key string) error
}

const (
	peerPrefix = "peer/"
	mostPeers  = 256                 // records, and seeds
	peerAge    = 30 * 24 * time.Hour // since a host was there
	peerFresh  = 24 * time.Hour      // no record is written again earlier

	joinPause    = 1500 * time.Millisecond
	mostJoins    = 8 // at once
	resolveAge   = time.Minute
	resolveLimit = 2 * time.Second
)

// seed is a peer that somebody named.
type seed struct {
	host  string // name or address
	port  uint16
	addrs []netip.AddrPort
	at    time.Time // when addrs were looked up
	// failed is why they could not be, last time.
	failed string
}

// known is a host that was there once.
type known struct {
	Addr netip.AddrPort `json:"addr"`
	Name string         `json:"name"`
	Seen time.Time      `json:"seen"`

	rev uint64
}

// AddPeers names further peers, which are tried as those of the configuration.
func (g *Gossip) AddPeers(addrs ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, text := range addrs {
		if g.seeds[text] != nil || text == "" || len(g.seeds) >= mostPeers {
			continue
		}
		s := &seed{host: text, port: g.bind.Port()}
		if host, port, err := net.SplitHostPort(text); err == nil {
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				g.log.Warnf("peer %s: port %q is not a number", text, port)
				continue
			}
			s.host, s.port = host, uint16(n)
		}
		g.seeds[text] = s
	}
	wake(g.more)
}

// meet has a host tried that talks to this one, but not more often than others;
// mu is held.
func (g *Gossip) meet(a netip.AddrPort) {
	if g.ended || !a.IsValid() || a.Addr().IsUnspecified() || a.Addr().IsMulticast() || len(g.strangers) >= mostPeers {
		return
	}
	if _, ok := g.strangers[a]; !ok {
		g.strangers[a] = time.Time{}
		wake(g.more)
	}
}

// stayJoined tries hosts that are not members but could be: those that were
// named, and those that were there once. After a partition that is what makes
// one cluster of two, as memberlist forgets who is dead.
func (g *Gossip) stayJoined(ctx context.Context, list *memberlist.Memberlist) error {
	hosts, err := g.load(ctx)
	if err != nil && ctx.Err() == nil {
		g.log.Warnf("hosts that were there before are not known: %v", err)
	}
	tick := time.NewTicker(joinPause)
	defer tick.Stop()
	for {
		g.remember(ctx, hosts)
		g.joinSome(ctx, list, hosts)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-g.more:
		}
	}
}

// joinSome tries some of those that are missing, and returns when all have
// answered or failed.
func (g *Gossip) joinSome(ctx context.Context, list *memberlist.Memberlist, hosts map[string]*known) {
	there := g.there()
	missing := g.resolve(ctx, there)
	for _, k := range hosts {
		missing[k.Addr] = true
	}
	maps.DeleteFunc(missing, func(a netip.AddrPort, _ bool) bool { return there[a] })
	// Every member misses the same hosts. Together they try each some 8 times in
	// a round, however many they are.
	alone := len(there) == 1
	try := slices.Collect(maps.Keys(missing))
	if !alone {
		try = slices.DeleteFunc(try, func(netip.AddrPort) bool { return rand.IntN(len(there)) >= mostJoins })
	}
	rand.Shuffle(len(try), func(i, j int) { try[i], try[j] = try[j], try[i] })
	try = slices.Concat(g.unmet(there), try)
	var wg sync.WaitGroup
	for _, a := range try[:min(len(try), mostJoins)] {
		wg.Go(func() { _, _ = list.Join([]string{a.String()}) }) // memberlist logs why not
	}
	wg.Wait()
	g.missing(g.there())
	if alone && len(try) > 0 && len(g.there()) == 1 && ctx.Err() == nil && g.once("alone") {
		g.log.Warnf("no other host answers at port %d, tcp and udp; trying on", g.bind.Port())
	}
}

// unmet are those who talk to this host and were not tried just now.
func (g *Gossip) unmet(there map[netip.AddrPort]bool) []netip.AddrPort {
	g.mu.Lock()
	defer g.mu.Unlock()
	var list []netip.AddrPort
	for a, tried := range g.strangers {
		switch {
		case there[a], !tried.IsZero() && time.Since(tried) > joinPause:
			delete(g.strangers, a) // it is met again if it goes on talking
		case tried.IsZero() && len(list) < mostJoins:
			g.strangers[a] = time.Now()
			list = append(list, a)
		}
	}
	return list
}

// there are the addresses of all members, and of this host.
func (g *Gossip) there() map[netip.AddrPort]bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := map[netip.AddrPort]bool{g.bind: true}
	for _, p := range g.peers {
		for _, n := range p.nodes {
			list[addrOf(n)] = true
		}
	}
	return list
}

func addrOf(n memberlist.Node) netip.AddrPort {
	a, _ := netip.AddrFromSlice(n.Addr)
	return netip.AddrPortFrom(a.Unmap(), n.Port)
}

// resolve looks up names again whose addresses are not all members.
func (g *Gossip) resolve(ctx context.Context, there map[netip.AddrPort]bool) map[netip.AddrPort]bool {
	g.mu.Lock()
	seeds := slices.Collect(maps.Values(g.seeds)) // only this goroutine changes them
	g.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range seeds {
		if !slices.ContainsFunc(s.addrs, func(a netip.AddrPort) bool { return !there[a] }) && time.Since(s.at) < resolveAge {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, resolveLimit)
			defer cancel()
			addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", s.host)
			if err != nil {
				if g.once("name " + s.host) {
					g.log.Warnf("peer %s: %v", s.host, err)
				}
				g.mu.Lock()
				s.failed = Plain(err.Error())
				g.mu.Unlock()
				return // what it was before is better than nothing
			}
			g.mu.Lock()
			defer g.mu.Unlock()
			s.addrs, s.at, s.failed = nil, time.Now(), ""
			for _, a := range addrs {
				if a = a.Unmap(); a.Is4() == g.bind.Addr().Is4() {
					s.addrs = append(s.addrs, netip.AddrPortFrom(a, s.port))
				}
			}
		})
	}
	wg.Wait()
	list := map[netip.AddrPort]bool{}
	for _, s := range seeds {
		for _, a := range s.addrs {
			list[a] = true
		}
	}
	return list
}

// load reads the hosts that were there once.
func (g *Gossip) load(ctx context.Context) (map[string]*known, error) {
	hosts := map[string]*known{}
	if g.store == nil {
		return hosts, nil
	}
	records, err := g.store.List(ctx, peerPrefix)
	if err != nil {
		return hosts, err
	}
	for _, r := range records {
		k := known{rev: r.Rev}
		if err := json.Unmarshal(r.Value, &k); err != nil || !k.Addr.IsValid() {
			g.forget(ctx, r.Key[len(peerPrefix):])
			continue
		}
		hosts[r.Key[len(peerPrefix):]] = &k
	}
	return hosts, nil
}

// remember writes down who is there, and forgets who was not for long. A host
// that is alone forgets nobody: its clock may be wrong.
func (g *Gossip) remember(ctx context.Context, hosts map[string]*known) {
	now := time.Now()
	here := map[string]bool{}
	g.mu.Lock()
	var changed []string
	for id, p := range g.peers {
		if len(p.nodes) == 0 {
			continue
		}
		here[id] = true
		k, addr := hosts[id], addrOf(p.nodes[len(p.nodes)-1])
		if k == nil {
			k = &known{}
			hosts[id] = k
		}
		if k.Addr != addr || k.Name != p.name || now.Sub(k.Seen).Abs() > peerFresh {
			k.Addr, k.Name, k.Seen = addr, p.name, now
			changed = append(changed, id)
		}
	}
	g.mu.Unlock()
	for _, id := range changed {
		if err := g.save(ctx, id, hosts[id]); err != nil && ctx.Err() == nil && g.once("save") {
			g.log.Warnf("%v", err)
		}
	}
	oldest := slices.SortedFunc(maps.Keys(hosts), func(a, b string) int { return hosts[a].Seen.Compare(hosts[b].Seen) })
	for _, id := range oldest {
		if !here[id] && len(here) > 0 && (len(hosts) > mostPeers || now.Sub(hosts[id].Seen) > peerAge) {
			delete(hosts, id)
			g.forget(ctx, id)
		}
	}
}

func (g *Gossip) save(ctx context.Context, id string, k *known) error {
	if g.store == nil {
		return nil
	}
	value, err := json.Marshal(k)
	if err != nil {
		return fmt.Errorf("encode peer %s: %w", id, err)
	}
	r, err := g.store.Put(ctx, store.Record{Key: peerPrefix + id, Value: value, Rev: k.rev})
	if err != nil {
		return fmt.Errorf("save peer: %w", err)
	}
	k.rev = r.Rev
	return nil
}

func (g *Gossip) forget(ctx context.Context, id string) {
	if g.store == nil {
		return
	}
	if err := g.store.Delete(ctx, peerPrefix+id); err != nil && !errors.Is(err, store.ErrNotFound) && ctx.Err() == nil && g.once("forget") {
		g.log.Warnf("delete peer: %v", err)
	}
}
