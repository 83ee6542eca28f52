package datapath

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// nftGroup is NFNLGRP_NFTABLES, by which the kernel tells what changes in any
	// table.
	nftGroup = 7
	// damageBuffer holds what is told of a reload of ten thousand rules. What does
	// not fit is lost, and that is told too.
	damageBuffer = 4 << 20
	// redial is how long to wait before listening anew.
	redial = 5 * time.Second
)

// Damaged gets a value when somebody took away rules of our table, or rules of the
// FORWARD chains, in which ours may have been. Several changes may be one value.
func (k *Kernel) Damaged() <-chan struct{} { return k.damaged }

// Watch listens to changes of nftables until ctx ends. iptables-legacy tells of
// nothing: there the next pass finds what is missing.
func (k *Kernel) Watch(ctx context.Context) error {
	for said := false; ; {
		err := k.watch(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it ended because it was to end
		}
		if !said {
			said = true
			k.log.WithError(err).Warn("changes of the firewall are not heard of: damage lasts until the next pass, up to 30 s")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(redial):
		}
	}
}

func (k *Kernel) watch(ctx context.Context) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: k.firewall.ns.fd()})
	if err != nil {
		return fmt.Errorf("open netfilter socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if stop() {
			_ = conn.Close()
		}
	}()
	if err := errors.Join(conn.SetReadBuffer(damageBuffer), conn.JoinGroup(nftGroup)); err != nil {
		return fmt.Errorf("listen to changes of nftables: %w", err)
	}
	for {
		msgs, err := conn.Receive()
		lost := errors.Is(err, unix.ENOBUFS)
		if err != nil && !lost {
			return fmt.Errorf("listen to changes of nftables: %w", err)
		}
		for _, m := range msgs {
			lost = lost || takesAway(m, k.firewall.rs.table.Name)
		}
		if lost {
			select {
			case k.damaged <- struct{}{}:
			default: // one is waiting already
			}
		}
	}
}

// takesAway reports whether a change takes something from our table, or from a
// FORWARD chain. Elements come and go with every container: they are not looked
// at. Our own changes of rules are, which costs one pass that finds nothing.
func takesAway(m netlink.Message, table string) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
		return false
	}
	kind := int(m.Header.Type & 0xff)
	switch kind {
	case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET:
	default:
		return false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return true
	}
	// The table is the first attribute of all four; the chain is one of two.
	var of, chain string
	for ad.Next() {
		switch at := int(ad.Type()); {
		case at == unix.NFTA_TABLE_NAME:
			of = ad.String()
		case at == unix.NFTA_CHAIN_NAME && kind == unix.NFT_MSG_DELCHAIN, at == unix.NFTA_RULE_CHAIN && kind == unix.NFT_MSG_DELRULE:
			chain = ad.String()
		}
	}
	switch m.Data[0] {
	case unix.NFPROTO_INET:
		return of == table
	case unix.NFPROTO_IPV4, unix.NFPROTO_IPV6:
		return of == "filter" && (chain == "FORWARD" || kind == unix.NFT_MSG_DELTABLE)
	}
	return false
}
