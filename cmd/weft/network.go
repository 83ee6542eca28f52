package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/internal/datapath"
)

// unclaimed is the word for what is in the kernel and in no record.
const unclaimed = "unclaimed"

// network forgets a network that the engine no longer has.
func (p program) network(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("weft network", flag.ContinueOnError)
	find := p.socketFlags(fs)
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) != 2 || words[0] != "forget" {
		return p.wrong("network takes: forget ID, or forget unclaimed for all that is in no record")
	}
	socket, err := find()
	if err != nil {
		return err
	}
	var done string
	if err := admin.Post(ctx, socket, admin.PathNetwork, words[1], &done); err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.out, done)
	return err
}

// network carries it out.
func (d *daemon) network(ctx context.Context, body []byte) (any, error) {
	var what string
	if err := json.Unmarshal(body, &what); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	p, err := d.recoveredParts()
	if err != nil {
		return nil, err
	}
	if what == unclaimed {
		return p.driver.ForgetUnclaimed(ctx)
	}
	var subnets []netip.Prefix
	done, subnets, err := p.driver.Forget(ctx, what)
	if err != nil {
		return nil, err
	}
	for _, s := range subnets {
		stays, err := p.ipam.ForgetPool(ctx, s, p.driver.LinksWith(s))
		switch {
		case err != nil: // the network is gone all the same, and could not be named again
			done += fmt.Sprintf("; its subnet %s could not be freed yet and is tried again: %v", s, err)
		case stays:
			done += fmt.Sprintf("; the addresses of %s stay taken, because another network has that subnet: `weft address release -stranded` frees those that no container has", s)
		}
	}
	return done, nil
}

// uninstall removes all that an instance has in the kernel. It needs no plugin, and
// refuses to work beside one.
func (p program) uninstall(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("weft uninstall", flag.ContinueOnError)
	name := fs.String("instance", datapath.DefaultInstance, "of which plugin: its setting INSTANCE, or global with SCOPE=global")
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) > 0 {
		return p.wrong("uninstall takes no argument %q", words[0])
	}
	if err := datapath.CheckInstance(*name); err != nil {
		return p.wrong("-instance: %v", err)
	}
	log := logrus.New()
	log.SetOutput(p.err)
	lock, err := datapath.Acquire(ctx, log, *name, "weft uninstall")
	if err != nil {
		return fmt.Errorf("%w; its plugin has to be removed first: docker plugin rm -f", err)
	}
	defer lock.Close()
	k, err := datapath.New(datapath.Config{Instance: *name, Log: log})
	if err != nil {
		return err
	}
	defer k.Close()
	removed, err := k.Uninstall(ctx)
	for _, line := range removed {
		_, _ = fmt.Fprintln(p.out, "removed: "+line)
	}
	if err != nil {
		return err
	}
	if len(removed) > 0 {
		_, err = fmt.Fprintf(p.out, "nothing of instance %s is left in this host's network. IP forwarding stays as it is: see sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding\n", *name)
		return err
	}
	others, err := k.Others(ctx)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		return fmt.Errorf("there is nothing of instance %s on this host, but there is of instance %s: choose one with -instance", *name, strings.Join(others, ", "))
	}
	_, err = fmt.Fprintf(p.out, "there is nothing of instance %s on this host\n", *name)
	return err
}
