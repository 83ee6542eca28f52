package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/ipam"
)

// address keeps an address for a name, or frees one.
func (p program) address(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("weft address", flag.ContinueOnError)
	find := p.socketFlags(fs)
	pool := fs.String("pool", "", "subnet, where the address or name alone does not say which")
	space := fs.String("space", "", "address space that hosts share, as in --ipam-opt space=NAME")
	stranded := fs.Bool("stranded", false, "release all addresses that no container has")
	force := fs.Bool("force", false, "release an address of a host that is dead, or of another driver's network")
	at := fs.String("at", "", "history: only who had an address in that minute, second or day: 14:05, 2006-01-02, 2006-01-02 14:05, or RFC 3339")
	asJSON := fs.Bool("json", false, "history: print JSON")
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) > 0 && words[0] == "history" {
		return p.history(ctx, find, words[1:], *at, *asJSON)
	}
	if *at != "" || *asJSON {
		return p.wrong("-at and -json are for history: weft address history ADDRESS -at 14:05")
	}
	o := ipam.Order{Space: *space, Force: *force, Stranded: *stranded}
	if len(words) > 0 {
		o.Do = words[0]
	}
	switch {
	case o.Stranded && o.Do == "release" && len(words) == 1:
	case o.Stranded:
		return p.wrong("-stranded is for release, without an address: weft address release -stranded")
	case o.Do == "release" && len(words) == 2:
		o.Address, err = netip.ParseAddr(words[1])
	case o.Do == "forget" && len(words) == 2:
		if o.Address, err = netip.ParseAddr(words[1]); err != nil {
			o.Name, err = words[1], nil
		}
	case o.Do == "reserve" && (len(words) == 3 || len(words) == 4):
		o.Name = words[1]
		o.Address, err = netip.ParseAddr(words[2])
		if len(words) == 4 {
			o.MAC = words[3]
		}
	default:
		return p.wrong("address takes one of: reserve NAME ADDRESS [MAC], forget NAME|ADDRESS, release ADDRESS, release -stranded, history [ADDRESS|NAME]")
	}
	if err == nil && *pool != "" {
		o.Pool, err = netip.ParsePrefix(*pool)
	}
	if err != nil {
		return p.wrong("%v", err)
	}
	socket, err := find()
	if err != nil {
		return err
	}
	var done string
	if err := admin.Post(ctx, socket, admin.PathAddress, o, &done); err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.out, done)
	return err
}

// address carries it out.
func (d *daemon) address(ctx context.Context, body []byte) (any, error) {
	var o ipam.Order
	if err := json.Unmarshal(body, &o); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	p, err := d.recoveredParts()
	if err != nil {
		return nil, err
	}
	return p.ipam.Carry(ctx, o)
}
