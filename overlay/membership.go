package overlay

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// Join is how a host finds the others, and is let in.
type Join struct {
	// Keys encrypt and authenticate, the first of them what is sent.
	Keys [][]byte
	// Peers are host[:port].
	Peers []string
}

// joiner is an Engine that can be told of further peers and keys while it runs.
type joiner interface {
	AddPeers(addrs ...string)
	AddKey(key []byte) error
	UseKey(key []byte) error
	RemoveKey(key []byte) error
}

// become makes an engine that was given j go on with o.
func (j Join) become(o Join, e joiner) error {
	e.AddPeers(o.Peers...)
	for _, k := range o.Keys {
		if !j.has(k) {
			if err := e.AddKey(k); err != nil {
				return err
			}
		}
	}
	if len(o.Keys) > 0 {
		if err := e.UseKey(o.Keys[0]); err != nil {
			return err
		}
	}
	for _, k := range j.Keys {
		if !o.has(k) {
			if err := e.RemoveKey(k); err != nil {
				return err
			}
		}
	}
	return nil
}

func (j Join) has(key []byte) bool {
	return slices.ContainsFunc(j.Keys, func(k []byte) bool { return slices.Equal(k, key) })
}

// with returns j and what is new in o.
func (j Join) with(o Join) Join {
	j.Keys, j.Peers = slices.Clone(j.Keys), slices.Clone(j.Peers)
	for _, k := range o.Keys {
		if !j.has(k) {
			j.Keys = append(j.Keys, k)
		}
	}
	for _, p := range o.Peers {
		if !slices.Contains(j.Peers, p) {
			j.Peers = append(j.Peers, p)
		}
	}
	return j
}

// What is kept and passed on is bounded: any one peer that can be reached is
// enough, and a key is exchanged for one other at a time.
const (
	mostPassed = 32
	mostKeys   = 3
)

// String is the form in which a swarm passes it on to its nodes:
// KEY[,KEY]@PEER[,PEER], the keys in hex.
func (j Join) String() string {
	keys := make([]string, len(j.Keys))
	for i, k := range j.Keys {
		keys[i] = hex.EncodeToString(k)
	}
	return strings.Join(keys, ",") + "@" + strings.Join(j.Peers, ",")
}

// ParseJoin reads what String writes.
func ParseJoin(s string) (j Join, err error) {
	keys, peers, ok := strings.Cut(s, "@")
	if !ok || len(s) > 4096 {
		return j, fmt.Errorf("%.40q does not say how to join the cluster", s)
	}
	for text := range strings.SplitSeq(keys, ",") {
		if text == "" {
			continue
		}
		k, err := hex.DecodeString(text)
		if err != nil || len(k) != keyLen {
			return Join{}, fmt.Errorf("how to join the cluster: a key is not %d bytes in hex", keyLen)
		}
		if len(j.Keys) == mostKeys {
			return Join{}, fmt.Errorf("how to join the cluster: more than %d keys", mostKeys)
		}
		j.Keys = append(j.Keys, k)
	}
	j.Peers, err = ParsePeers(peers)
	return j, err
}

// ParsePeers reads the setting PEERS: host[:port], comma separated.
func ParsePeers(s string) (peers []string, err error) {
	for p := range strings.SplitSeq(s, ",") {
		if p = strings.TrimSpace(p); p == "" {
			continue
		}
		host := p
		if _, err := netip.ParseAddr(p); err != nil && strings.Contains(p, ":") {
			h, port, err := net.SplitHostPort(p)
			if err != nil || port == "" || strings.Trim(port, "0123456789") != "" {
				return nil, fmt.Errorf("peer %q is not HOST or HOST:PORT", p)
			}
			host = h
		}
		if host == "" || strings.ContainsAny(host, " /@") {
			return nil, fmt.Errorf("peer %q is not HOST or HOST:PORT", p)
		}
		peers = append(peers, p)
	}
	return peers, nil
}
