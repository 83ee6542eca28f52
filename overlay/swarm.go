package overlay

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/store"
)

// Records of what a swarm said. The engine says it once: nodes that joined are
// not announced again after a restart of ours.
const (
	selfKey = "swarm/self"
	vniKey  = "swarm/vni/" // and the network's ID
)

// loadSwarm reads back what a swarm said.
func (c *Cluster) loadSwarm(ctx context.Context) error {
	if err := c.loadJoin(ctx); err != nil {
		return err
	}
	text, err := c.kept(ctx, selfKey)
	if err != nil {
		return err
	}
	if text != "" {
		if c.self, err = netip.ParseAddr(text); err != nil {
			return fmt.Errorf("record %s: %w", selfKey, err)
		}
	}
	list, err := c.c.Kept.List(ctx, vniKey)
	if err != nil {
		return err
	}
	for _, r := range list {
		var vni uint32
		if err := json.Unmarshal(r.Value, &vni); err != nil {
			return fmt.Errorf("record %s: %w", r.Key, err)
		}
		c.vnis[strings.TrimPrefix(r.Key, vniKey)] = vni
	}
	return nil
}

func (c *Cluster) kept(ctx context.Context, key string) (string, error) {
	r, err := c.c.Kept.Get(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	return string(r.Value), err
}

// keep writes a record that only this process writes.
func (c *Cluster) keep(ctx context.Context, key, value string) error {
	r, err := c.c.Kept.Get(ctx, key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if err == nil && string(r.Value) == value {
		return nil
	}
	_, err = c.c.Kept.Put(ctx, store.Record{Key: key, Value: []byte(value), Rev: r.Rev})
	return err
}

// learn takes over how to join the cluster.
func (c *Cluster) learn(ctx context.Context, text string) error {
	j, err := ParseJoin(text)
	if err != nil {
		return err
	}
	return c.extend(ctx, j)
}

func (c *Cluster) extend(ctx context.Context, j Join) error {
	// What is said last counts most: a host may have left one swarm for another.
	return c.rejoin(ctx, func(now Join) (Join, error) {
		all := j.with(now)
		all.Keys, all.Peers = all.Keys[:min(len(all.Keys), mostKeys)], all.Peers[:min(len(all.Peers), mostPassed)]
		return all, nil
	})
}

// Allocate implements the driver's swarm. Without a SECRET the leader makes a
// key and gives it to the nodes with the network, as swarm does with the keys of
// its own overlay: whoever may read the network's options may read it.
func (c *Cluster) Allocate(ctx context.Context, n driver.Network) (vni uint32, join string, err error) {
	c.mu.Lock()
	delete(c.unconfirmed, n.ID)
	c.mu.Unlock()
	if n.Options.Join != "" { // our own answer, or that of the leader before us
		if err := c.learn(ctx, n.Options.Join); err != nil {
			return 0, "", err
		}
	}
	u, err := c.where(ctx)
	if err != nil {
		return 0, "", fmt.Errorf("where this host reaches others from: %w", err)
	}
	mine := Join{Peers: []string{u.Addr.String()}}
	c.mu.Lock()
	vni, known := c.vnis[n.ID]
	// With the last network its key has ended too.
	bare := len(c.join.Keys) == 0 || len(c.c.Join.Keys) == 0 && len(c.vnis) == 0 && n.Options.Join == ""
	c.mu.Unlock()
	if bare {
		key := make([]byte, keyLen)
		_, _ = rand.Read(key) // never fails
		mine.Keys = [][]byte{key}
	}
	if err := c.extend(ctx, mine); err != nil {
		return 0, "", err
	}
	switch {
	case n.Options.VNI != 0:
		vni = n.Options.VNI
	case !known:
		if vni, err = c.choose(ctx); err != nil {
			return 0, "", err
		}
	}
	if err := c.claim(ctx, n.ID, vni); err != nil {
		return 0, "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c.Join.Keys != nil { // every node has the SECRET
		return vni, Join{Peers: c.join.Peers}.String(), nil
	}
	return vni, c.join.String(), nil
}

// Elected says that a swarm allocator was started on this node. Networks may have
// been removed while another node's was in office. The new one names all that
// there are before it asks for others: those that it has not named may lose
// their VNI.
func (c *Cluster) Elected() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unconfirmed = make(map[string]bool, len(c.vnis))
	for id := range c.vnis {
		c.unconfirmed[id] = true
	}
}

// claim gives a network a VNI that no other has.
func (c *Cluster) claim(ctx context.Context, id string, vni uint32) error {
	c.mu.Lock()
	before, known := c.vnis[id]
	gone := ""
	for o, v := range c.vnis {
		if v != vni || o == id {
			continue
		}
		if !c.unconfirmed[o] {
			c.mu.Unlock()
			return fmt.Errorf("VNI %d is that of network %.12s: give another with -o vni=, or none", vni, o)
		}
		gone = o
	}
	c.vnis[id] = vni // at once: another call may want it too
	c.mu.Unlock()
	var err error
	if gone != "" {
		c.c.Log.WithField("vni", vni).Infof("the swarm's allocator does not know network %.12s any more: its VNI is free", gone)
		err = c.c.Kept.Delete(ctx, vniKey+gone)
	}
	if err == nil {
		err = c.keep(ctx, vniKey+id, fmt.Sprint(vni))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		delete(c.vnis, gone)
	case known:
		c.vnis[id] = before
	default:
		delete(c.vnis, id)
	}
	return err
}

// allocated is the network of the swarm that has a VNI, or "".
func (c *Cluster) allocated(vni uint32) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, v := range c.vnis {
		if v == vni {
			return id
		}
	}
	return ""
}

// Free implements the driver's swarm.
func (c *Cluster) Free(ctx context.Context, networkID string) error {
	c.mu.Lock()
	delete(c.vnis, networkID)
	delete(c.unconfirmed, networkID)
	c.mu.Unlock()
	return c.c.Kept.Delete(ctx, vniKey+networkID)
}

// Discover implements the driver's swarm.
func (c *Cluster) Discover(ctx context.Context, a netip.Addr, self bool) error {
	if !self {
		return c.extend(ctx, Join{Peers: []string{a.String()}})
	}
	if err := c.keep(ctx, selfKey, a.String()); err != nil {
		return err
	}
	c.mu.Lock()
	c.self = a
	c.mu.Unlock()
	return nil
}
