package overlay

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// joinKey is the record of how this host joins the cluster.
const joinKey = "join"

// joined is that record. Base tells with which SECRET it was written: with
// another one, the keys in it are of another cluster or of the time before.
type joined struct {
	Base string
	Join string
}

// base is the fingerprint of the keys that the settings give.
func base(j Join) string {
	if len(j.Keys) == 0 {
		return ""
	}
	sum := sha256.Sum256(j.Keys[0])
	return hex.EncodeToString(sum[:8])
}

// loadJoin adds what was learnt to what the settings say.
func (c *Cluster) loadJoin(ctx context.Context) error {
	text, err := c.kept(ctx, joinKey)
	if err != nil || text == "" {
		return err
	}
	var r joined
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return fmt.Errorf("record %s: %w", joinKey, err)
	}
	j, err := ParseJoin(r.Join)
	if err != nil {
		return fmt.Errorf("record %s: %w", joinKey, err)
	}
	keys := c.join.Keys
	if r.Base == base(c.c.Join) {
		keys = j.Keys
	}
	c.join = Join{Keys: keys, Peers: c.join.with(j).Peers}
	return nil
}

// rejoin changes how this host joins the cluster, now and after a restart.
func (c *Cluster) rejoin(ctx context.Context, change func(Join) (Join, error)) error {
	c.joining.Lock()
	defer c.joining.Unlock()
	c.mu.Lock()
	now := c.join
	c.mu.Unlock()
	next, err := change(now)
	if err != nil {
		return err
	}
	value, err := json.Marshal(joined{Base: base(c.c.Join), Join: next.String()})
	if err != nil {
		return fmt.Errorf("encode %s: %w", joinKey, err)
	}
	if err := c.keep(ctx, joinKey, string(value)); err != nil {
		return err
	}
	c.mu.Lock()
	c.join = next
	c.mu.Unlock()
	wake(c.wake)
	return nil
}

// The steps of exchanging a password, each on all hosts before the next.
const (
	SecretAdd    = "add"    // the new password is accepted beside the old one
	SecretUse    = "use"    // what is sent is encrypted with it
	SecretRemove = "remove" // the old password is no longer accepted
)

// Secret exchanges the cluster's password while everything runs. What it does
// stays after a restart, until the setting SECRET is given another value.
func (c *Cluster) Secret(ctx context.Context, step, password string) error {
	if password == "" {
		return errors.New("the password is empty")
	}
	key := Key(password)
	return c.rejoin(ctx, func(j Join) (Join, error) {
		i := slices.IndexFunc(j.Keys, func(k []byte) bool { return slices.Equal(k, key) })
		keys := slices.Clone(j.Keys)
		switch {
		case len(keys) == 0:
			return j, errors.New("this host was started without a password: set SECRET, on all hosts")
		case step == SecretAdd && i < 0 && len(keys) == mostKeys:
			return j, fmt.Errorf("%d passwords are accepted already: remove one first", mostKeys)
		case step == SecretAdd && i < 0:
			keys = append(keys, key)
		case step == SecretAdd: // it is there
		case step == SecretRemove && i < 0: // it is gone
		case i < 0:
			return j, errors.New("that password was not added on this host: weft secret add")
		case step == SecretUse:
			keys = append([][]byte{key}, slices.Delete(keys, i, i+1)...)
		case step == SecretRemove && i == 0:
			return j, errors.New("that password is in use on this host: weft secret use with the other one first")
		case step == SecretRemove:
			keys = slices.Delete(keys, i, i+1)
		default:
			return j, fmt.Errorf("%q is not %s, %s or %s", step, SecretAdd, SecretUse, SecretRemove)
		}
		return Join{Keys: keys, Peers: j.Peers}, nil
	})
}
