package ipam

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Load reads all pools and addresses. Until it has succeeded every request
// fails, so that nothing is handed out that somebody has; it may be repeated.
func (i *IPAM) Load(ctx context.Context) error {
	release, err := i.change(ctx)
	if err != nil {
		return err
	}
	defer release()
	if i.ready() == nil {
		return nil
	}
	i.started = i.now()
	if err := i.loadBack(ctx); err != nil {
		return err
	}
	if err := i.loadHistory(ctx); err != nil {
		return err
	}
	pools := map[poolKey]*pool{}
	list, err := i.store.List(ctx, poolPrefix)
	if err != nil {
		return err
	}
	for _, r := range list {
		var rec poolRecord
		if err := decode(r.Key, r.Value, &rec, &rec.Version); err != nil {
			return err
		}
		id, err := parsePoolID(strings.TrimPrefix(r.Key, poolPrefix))
		if err == nil {
			id.sub = rec.SubPool
			err = id.validate()
		}
		p := newPool(id)
		for _, sub := range rec.More {
			more := poolID{id.poolKey, sub}
			if err == nil {
				err = more.validate()
			}
			if err == nil && slices.ContainsFunc(p.parts, func(o part) bool { return o.meets(sub) }) {
				err = fmt.Errorf("ip-range %s overlaps another", sub)
			}
			p.parts = append(p.parts, part{sub: sub})
		}
		if err != nil {
			return fmt.Errorf("record %s: %w", r.Key, err)
		}
		for n, o := range p.parts {
			p.parts[n].gateways = rec.Gateways[o.sub]
			// A release that did not write down whose the options are may have had them from each.
			p.parts[n].gave = len(rec.Options) > 0 && len(rec.Gave) == 0 || slices.Contains(rec.Gave, o.sub)
		}
		p.rev = r.Rev
		p.idleParts()
		if p.opts, err = parseOptions(rec.Options, id.prefix); err != nil {
			return fmt.Errorf("record %s: %w", r.Key, err)
		}
		if p.added, err = parseReserved(rec.Reserved, id.prefix); err != nil {
			return fmt.Errorf("record %s: %w", r.Key, err)
		}
		p.reserve()
		i.recall(p)
		pools[id.poolKey] = p
	}
	holders, err := i.loadAddresses(ctx, pools)
	if err != nil {
		return err
	}
	if err := i.loadNames(ctx, pools, holders); err != nil {
		return err
	}
	if err := i.loadLeases(ctx, pools); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.pools, i.loaded = pools, true
	return nil
}

// loadAddresses returns the names that have addresses.
func (i *IPAM) loadAddresses(ctx context.Context, pools map[poolKey]*pool) (map[*pool]map[netip.Addr]string, error) {
	list, err := i.store.List(ctx, addressPrefix)
	if err != nil {
		return nil, err
	}
	holders := map[*pool]map[netip.Addr]string{}
	newest := map[*pool]uint64{}
	orphans := map[poolKey]bool{}
	for _, r := range list {
		var rec addressRecord
		if err := decode(r.Key, r.Value, &rec, &rec.Version); err != nil {
			return nil, err
		}
		k, a, err := parseAddressKey(r.Key)
		if err != nil {
			return nil, err
		}
		p := pools[k]
		if p == nil {
			orphans[k] = true
			continue
		}
		if rec.Kind == kindGateway && !p.claimed(a) { // the process died before it was noted whose
			if err := i.store.Delete(ctx, r.Key); err != nil {
				return nil, err
			}
			continue
		}
		p.taken.add(a)
		p.before.add(a)
		i.history.adopt(k, a, rec)
		if rec.Kind == kindAuto {
			p.chosen.add(a)
		}
		if holders[p] == nil {
			holders[p] = map[netip.Addr]string{}
		}
		holders[p][a] = rec.Name
		if rec.Kind == kindGateway {
			p.gateways[a] = r.Rev
		} else if p.named() { // the process may have died before its endpoint came
			p.awaited[a] = i.started
		}
		// Revisions grow, so the highest is the address chosen last.
		if p.nextFit() && rec.Kind == kindAuto && r.Rev > newest[p] {
			newest[p], p.cursor = r.Rev, a.Next()
		}
	}
	for _, p := range pools {
		for n, o := range p.parts {
			if o.gateways == nil {
				o.gateways = slices.Collect(maps.Keys(p.gateways))
			}
			p.parts[n].gateways = slices.DeleteFunc(o.gateways, func(a netip.Addr) bool { return p.gateways[a] == 0 })
		}
	}
	for k := range orphans { // the process died while it released the pool
		if err := i.store.DeletePrefix(ctx, k.addresses()); err != nil {
			return nil, err
		}
	}
	return holders, nil
}

// decode reads a record of the one version that there is.
func decode(key string, value []byte, into any, version *int) error {
	if err := json.Unmarshal(value, into); err != nil {
		return fmt.Errorf("record %s: %w", key, err)
	}
	if *version != recordVersion {
		return fmt.Errorf("record %s has version %d and this version of weft knows only %d: use the version that wrote it", key, *version, recordVersion)
	}
	return nil
}
