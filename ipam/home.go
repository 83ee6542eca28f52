package ipam

import (
	"context"
	"encoding/json"
	"net/netip"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// home is where the records of a pool are. What is put fails with
// store.ErrExists where somebody else has it; what is dropped may be unknown.
type home interface {
	// putPool makes the record of a pool that no other goroutine changes, or
	// replaces it. beside is as with putAddress.
	putPool(ctx context.Context, p *pool, beside store.Batch) error
	// dropPool deletes it with all addresses.
	dropPool(ctx context.Context, k poolKey) error
	// putAddress makes the record of an address. beside is written in the same
	// transaction as long as that is one of this host's disk; so with dropAddress.
	putAddress(ctx context.Context, k poolKey, a netip.Addr, g grant, beside store.Batch) (rev uint64, err error)
	dropAddress(ctx context.Context, k poolKey, a netip.Addr, beside store.Batch) error
}

// grant is whom an address is for. kept is the revision of the claim that the name
// keeps, in a shared space, if it is known.
type grant struct {
	as   kind
	name string
	kept uint64
}

func (i *IPAM) home(k poolKey) home {
	if k.shared() {
		return i.shared
	}
	return disk{i.store}
}

// disk is the home of the pools of this host alone.
type disk struct{ store records }

// poolRecord and addressRecord are what is on disk.
type poolRecord struct {
	Version int
	SubPool netip.Prefix `json:",omitzero"`
	// More are the ranges of further networks that share the pool.
	More []netip.Prefix `json:",omitempty"`
	// Gave are the ranges whose networks gave the options, where there are several.
	Gave []netip.Prefix `json:",omitempty"`
	// Gateways are those that the network of each range asked for, where there are
	// several; without it, as in older records, each has all.
	Gateways map[netip.Prefix][]netip.Addr `json:",omitzero"`
	// Options are those of the network, Reserved what was added to them by
	// command: ADDRESS[,MAC] by name.
	Options  map[string]string `json:",omitempty"`
	Reserved map[string]string `json:",omitempty"`
	Created  time.Time
}

type addressRecord struct {
	Version int
	Kind    kind
	Name    string `json:",omitempty"` // of the container that has it, where it is known and the address is kept for it
	Created time.Time
}

const recordVersion = 1

func (d disk) putPool(ctx context.Context, p *pool, beside store.Batch) error {
	if err := d.findRev(ctx, p); err != nil {
		return err
	}
	rec := poolRecord{Version: recordVersion, SubPool: p.parts[0].sub, Options: p.opts.raw, Reserved: reservedTexts(p.added), Created: time.Now().UTC()}
	for _, o := range p.parts[1:] {
		rec.More = append(rec.More, o.sub)
	}
	if len(p.parts) > 1 {
		rec.Gateways = map[netip.Prefix][]netip.Addr{}
		for _, o := range p.parts {
			rec.Gateways[o.sub] = o.gateways
			if o.gave {
				rec.Gave = append(rec.Gave, o.sub)
			}
		}
	}
	v, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	beside.Put = &store.Record{Key: p.record(), Value: v, Rev: p.rev}
	r, err := d.store.Write(ctx, beside)
	if err == nil {
		p.rev = r.Rev
	}
	return err
}

// findRev reads the revision of a pool's record again if it is not known.
func (d disk) findRev(ctx context.Context, p *pool) error {
	if p.rev != 0 {
		return nil
	}
	have, err := d.store.List(ctx, p.record())
	if err != nil {
		return err
	}
	for _, r := range have {
		if r.Key == p.record() { // "…/2" also lists "…/24"
			p.rev = r.Rev
		}
	}
	return nil
}

func (d disk) dropPool(ctx context.Context, k poolKey) error {
	if err := d.store.Delete(ctx, k.record()); err != nil {
		return err
	}
	if err := d.store.DeletePrefix(ctx, k.addresses()); err != nil || !k.named() {
		return err
	}
	return d.store.DeletePrefix(ctx, k.names())
}

func (d disk) putAddress(ctx context.Context, k poolKey, a netip.Addr, g grant, beside store.Batch) (uint64, error) {
	v, err := json.Marshal(addressRecord{Version: recordVersion, Kind: g.as, Name: g.name, Created: time.Now().UTC()})
	if err != nil {
		return 0, err
	}
	beside.Put = &store.Record{Key: k.address(a), Value: v}
	r, err := d.store.Write(ctx, beside)
	return r.Rev, err
}

func (d disk) dropAddress(ctx context.Context, k poolKey, a netip.Addr, beside store.Batch) error {
	beside.Delete = append([]string{k.address(a)}, beside.Delete...)
	_, err := d.store.Write(ctx, beside)
	return err
}
