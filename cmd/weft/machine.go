package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/overlay"
)

// machineKey is the record of the machine that a state belongs to.
const machineKey = "host/machine"

// mostFacts is how many a machine has that gets new cards now and then.
const mostFacts = 32

type machineRecord struct {
	// Facts are all that datapath.Machine returned there, the newest last.
	Facts []string
	// Renew says that somebody asked for a new ID.
	Renew bool `json:",omitempty"`
}

// ownMachine makes this host another one, for its cluster and for DHCP servers,
// when its state was copied from another machine or somebody asked for that. A
// machine that has one fact of before is the same: boards and cards are replaced.
func ownMachine(ctx context.Context, db *store.Bolt, facts []string, log logrus.FieldLogger) error {
	m, rev, err := readMachine(ctx, db)
	if err != nil {
		return err
	}
	next := machineRecord{Facts: m.Facts}
	for _, f := range facts {
		if !slices.Contains(next.Facts, f) {
			next.Facts = append(next.Facts, f)
		}
	}
	next.Facts = next.Facts[max(0, len(next.Facts)-mostFacts):]
	copied := len(m.Facts) > 0 && len(facts) > 0 && !slices.ContainsFunc(facts, func(f string) bool { return slices.Contains(m.Facts, f) })
	if copied {
		next.Facts = facts
	}
	if copied || m.Renew {
		old, err := overlay.Identity(ctx, db)
		if err == nil {
			err = errors.Join(ipam.ForgetIdentity(ctx, db, copied), overlay.ForgetIdentity(ctx, db))
		}
		if err != nil {
			return err
		}
		id, err := overlay.Identity(ctx, db)
		if err != nil {
			return err
		}
		why := "somebody asked for it"
		if copied {
			why = "the state in this directory was copied from another machine"
		}
		log.WithFields(logrus.Fields{"old": old, "new": id}).Warnf("this host has a new ID, for other hosts and for DHCP servers: %s", why)
	}
	if !m.Renew && slices.Equal(next.Facts, m.Facts) {
		return nil
	}
	return writeMachine(ctx, db, next, rev)
}

func readMachine(ctx context.Context, db *store.Bolt) (m machineRecord, rev uint64, err error) {
	r, err := db.Get(ctx, machineKey)
	if errors.Is(err, store.ErrNotFound) {
		return m, 0, nil
	}
	if err == nil {
		err = json.Unmarshal(r.Value, &m)
	}
	if err != nil {
		return m, 0, fmt.Errorf("find out which machine this is: record %s: %w", machineKey, err)
	}
	return m, r.Rev, nil
}

func writeMachine(ctx context.Context, db *store.Bolt, m machineRecord, rev uint64) error {
	value, err := json.Marshal(m)
	if err == nil {
		_, err = db.Put(ctx, store.Record{Key: machineKey, Value: value, Rev: rev})
	}
	if err != nil {
		return fmt.Errorf("remember which machine this is: %w", err)
	}
	return nil
}

// cluster has the command `weft cluster new-id`.
func (p program) cluster(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("weft cluster", flag.ContinueOnError)
	find := p.socketFlags(fs)
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) != 1 || words[0] != "new-id" {
		return p.wrong("cluster takes new-id")
	}
	socket, err := find()
	if err != nil {
		return err
	}
	var done string
	if err := admin.Post(ctx, socket, admin.PathNewID, struct{}{}, &done); err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.out, done)
	return err
}

// newID notes that this host is to have a new ID. The one that it has is in what
// other hosts know and in what runs here, so it changes between two processes.
func (d *daemon) newID(ctx context.Context, _ []byte) (any, error) {
	p, err := d.recoveredParts()
	if err != nil {
		return nil, err
	}
	for _, pool := range p.ipam.Status(ctx).Pools {
		if pool.Shared() {
			return nil, fmt.Errorf("new-id: addresses of pool %s, space %s, are this host's under its ID: remove the network on this host first", pool.Pool, pool.Space)
		}
	}
	m, rev, err := readMachine(ctx, p.weft)
	if err != nil {
		return nil, err
	}
	m.Renew = true
	if err := writeMachine(ctx, p.weft, m, rev); err != nil {
		return nil, err
	}
	return "this host has a new ID when its plugin starts next: docker plugin disable -f NAME, docker plugin enable NAME", nil
}
