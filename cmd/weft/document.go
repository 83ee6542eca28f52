package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/overlay"
)

// The phases of a plugin's process.
const (
	recovering = "recovering" // calls wait
	serving    = "serving"
	failed     = "failed" // calls are answered with the error
)

// document is the plugin's answer to `weft status`, and what --json prints.
// Its form is stable: fields are added, never renamed.
type document struct {
	Version  string `json:"version"`
	Commit   string `json:"commit"`
	Instance string `json:"instance"` // setting INSTANCE
	Phase    string `json:"phase"`
	Error    string `json:"error,omitempty"` // why it failed
	driver.Status
	Pools   []ipam.PoolStatus `json:"pools"`
	Cluster overlay.Status    `json:"cluster"`

	now time.Time // ages are counted from it
}

// trouble is why the command's exit code is not 0.
func (d document) trouble() error {
	switch {
	case d.Phase == failed:
		return errors.New("the plugin has failed: every call is answered with that")
	case d.Drift.Error != "":
		return errors.New("not everything could be repaired")
	case slices.ContainsFunc(d.Cluster.Troubles, func(t overlay.Trouble) bool { return t.Twin }):
		return errors.New("two hosts have one ID, see `weft status peers`")
	}
	return nil
}

// ago is how long ago something was, for people.
func (d document) ago(t time.Time) string {
	age := max(d.now.Sub(t), 0)
	switch {
	case age < 2*time.Minute:
		return fmt.Sprintf("%ds", int(age.Seconds()))
	case age < 2*time.Hour:
		return fmt.Sprintf("%dm", int(age.Minutes()))
	case age < 48*time.Hour:
		return fmt.Sprintf("%dh", int(age.Hours()))
	}
	return fmt.Sprintf("%dd", int(age.Hours())/24)
}

// print writes the sections asked for, or all of them, for people.
func (d document) print(w io.Writer, words []string) error {
	w = plainWriter{w}
	if d.now.IsZero() {
		d.now = time.Now()
	}
	all := len(words) == 0
	if all || d.Phase != serving {
		name := d.Version
		if d.Instance != "" {
			name += ", instance " + d.Instance
		}
		if _, err := fmt.Fprintf(w, "weft %s: %s\n", name, d.Phase); err != nil {
			return err
		}
	}
	if d.Error != "" {
		if _, err := fmt.Fprintln(w, d.Error); err != nil {
			return err
		}
	}
	if d.Phase != serving {
		return nil
	}
	for _, section := range []struct {
		name string
		rows [][]string
	}{
		{"networks", d.networks()}, {"endpoints", d.endpoints()}, {"pools", d.pools()}, {"names", d.names()}, {"leases", d.leases()}, {"peers", d.peers()},
	} {
		asked := slices.Contains(words, section.name) || slices.Contains(ofPools, section.name) && slices.Contains(words, "pools")
		empty := (section.name == "peers" && all || slices.Contains(ofPools, section.name)) && len(section.rows) == 1
		if !all && !asked || empty {
			continue
		}
		if all || slices.Contains(ofPools, section.name) {
			if _, err := fmt.Fprintln(w); err != nil {
				return err
			}
		}
		if err := table(w, section.rows); err != nil {
			return err
		}
	}
	if !all {
		return nil
	}
	_, err := fmt.Fprintf(w, "\n%s", d.drift())
	return err
}

// ofPools are the sections that come with that of the pools.
var ofPools = []string{"names", "leases"}

// plainWriter keeps what others say, a host's name or a server's message, from
// moving the cursor of a terminal.
type plainWriter struct{ io.Writer }

// Write is part of io.Writer.
func (w plainWriter) Write(b []byte) (int, error) {
	_, err := io.WriteString(w.Writer, printable(string(b)))
	return len(b), err
}

// printable replaces what is neither printed nor the end of a line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return '?'
	}, s)
}

func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		if _, err := fmt.Fprintln(t, strings.Join(r, "\t")); err != nil {
			return err
		}
	}
	return t.Flush()
}

func (d document) networks() [][]string {
	var lines [][]string
	rows := [][]string{{"NETWORK", "MODE", "VNI", "LINK", "SUBNETS", "GATEWAYS", "MTU", "EGRESS", "INTERNAL", "ENDPOINTS", "OPTIONS"}}
	for _, n := range d.Networks {
		vni := "-"
		if n.VNI != 0 {
			vni = fmt.Sprint(n.VNI)
		}
		var pools, gateways, options []string
		for _, name := range slices.Sorted(maps.Keys(n.Options)) {
			options = append(options, name+"="+n.Options[name])
		}
		for _, s := range n.Subnets {
			pools = append(pools, s.Pool.String())
			gateways = append(gateways, orDash(s.Gateway))
		}
		mtu := "parent's"
		if n.MTU != 0 {
			mtu = fmt.Sprint(n.MTU)
		}
		rows = append(rows, []string{
			short(n.ID), n.Mode, vni, orDash(n.Link), list(pools), list(gateways), mtu, string(n.Egress), yesNo(n.Internal), fmt.Sprint(n.Endpoints), list(options),
		})
		if n.Warning != "" {
			lines = append(lines, []string{fmt.Sprintf("! network %s: %s", short(n.ID), n.Warning)})
		}
	}
	return append(rows, lines...)
}

func (d document) endpoints() [][]string {
	rows, names := [][]string{{"ENDPOINT", "NAME", "NETWORK", "ADDRESSES", "MAC", "LINK", "STATE", "PORTS"}}, d.holders()
	var lines [][]string
	for _, e := range d.Endpoints {
		var addrs, ports, name []string
		for _, a := range e.Addrs {
			addrs = append(addrs, a.Addr().String())
			if n := names[a.Addr()]; n != "" && !slices.Contains(name, n) {
				name = append(name, n)
			}
		}
		for _, p := range e.Ports {
			ports = append(ports, port(p))
		}
		rows = append(rows, []string{
			short(e.ID), list(name), short(e.Network), list(addrs), orDash(e.MAC.String()), e.Link, e.State, list(ports),
		})
		if len(e.LeftOut) > 0 {
			lines = append(lines, []string{fmt.Sprintf("! endpoint %s: not taken from the DHCP server: %s", short(e.ID), strings.Join(e.LeftOut, "; "))})
		}
	}
	return append(rows, lines...)
}

// holders are the names of containers by the addresses that they have. No engine
// tells a network driver any name; some tell an IPAM driver that of the container.
func (d document) holders() map[netip.Addr]string {
	names, twice := map[netip.Addr]string{}, map[netip.Addr]bool{}
	add := func(a netip.Addr, name string) {
		if have := names[a]; have != "" && have != name {
			twice[a] = true // in two pools of the same subnet
		}
		names[a] = name
	}
	for _, p := range d.Pools {
		for _, n := range p.Names {
			if n.Held && n.Host == "" && n.Name != ipam.NoName {
				add(n.Address, n.Name)
			}
		}
	}
	maps.DeleteFunc(names, func(a netip.Addr, _ string) bool { return twice[a] })
	return names
}

// port prints a published port as `docker ps` does.
func port(p driver.PortStatus) string {
	var ends [2]string
	if host, err := netip.ParseAddrPort(p.Host); err == nil && p.More > 0 {
		ends[0] = fmt.Sprintf("-%d", host.Port()+p.More)
	}
	if p.More > 0 {
		ends[1] = fmt.Sprintf("-%d", p.Container.Port()+p.More)
	}
	if p.Host == "" {
		return fmt.Sprintf("%s%s/%s", p.Container, ends[1], p.Proto)
	}
	return fmt.Sprintf("%s%s->%d%s/%s", p.Host, ends[0], p.Container.Port(), ends[1], p.Proto)
}

func (d document) pools() [][]string {
	rows := [][]string{{"POOL", "SPACE", "RANGE", "GATEWAY", "USED", "ALL HOSTS", "SIZE"}}
	var lines [][]string
	for _, p := range d.Pools {
		all := "-" // a pool of this host
		if p.UsedByAll > 0 {
			all = fmt.Sprint(p.UsedByAll)
		}
		rows = append(rows, []string{p.Pool, p.Space, orDash(p.SubPool), orDash(p.Gateway), fmt.Sprint(p.Used), all, p.Size})
		if n := len(p.MoreSubPools); n > 0 {
			lines = append(lines, []string{fmt.Sprintf("%d networks share pool %s, each with a range of its own: %s, %s", n+1, p.Pool, p.SubPool, strings.Join(p.MoreSubPools, ", "))})
		}
	}
	return append(rows, lines...)
}

// names lists what is kept for which container, and what somebody has to look at.
func (d document) names() [][]string {
	rows := [][]string{{"NAME", "ADDRESS", "MAC", "POOL", "STATE"}}
	var lines [][]string
	for _, p := range d.Pools {
		for _, n := range p.Names {
			state := "kept"
			switch {
			case n.Held && n.Reserved:
				state = "reserved, in use"
			case n.Reserved:
				state = "reserved"
			case n.Held:
				state = "in use"
			case !n.Released.IsZero():
				state = "kept, released " + d.ago(n.Released) + " ago"
			}
			if n.Host != "" {
				state += " on " + n.Host
			}
			rows = append(rows, []string{n.Name, n.Address.String(), orDash(n.MAC), p.Pool, state})
		}
		if p.Warning != "" {
			lines = append(lines, []string{"! " + p.Warning})
		}
		space := ""
		if p.Shared() {
			space = "-space " + p.Space + " "
		}
		for _, a := range p.Stranded {
			lines = append(lines, []string{fmt.Sprintf("! address %s of pool %s was given out and no endpoint has it: `weft address release %s%s` frees it, `weft address release -stranded` all", a, p.Pool, space, a)})
		}
	}
	return append(rows, lines...)
}

// forEver is the time of a lease that does not end.
const forEver = (1<<32 - 1) * time.Second

// leases lists what a DHCP server granted, and what is wrong with it.
func (d document) leases() [][]string {
	rows := [][]string{{"LEASE", "NAME", "MAC", "INTERFACE", "ENDS", "TROUBLE"}}
	var lines [][]string
	for _, p := range d.Pools {
		if p.DHCP == nil {
			continue
		}
		for _, l := range p.DHCP.Leases {
			ends := "in " + d.ago(d.now.Add(-l.Expires.Sub(d.now)))
			if l.Lease.Valid == forEver {
				ends = "never"
			} else if !l.Expires.After(d.now) {
				ends = d.ago(l.Expires) + " ago"
			}
			rows = append(rows, []string{l.Address.String(), orDash(l.Name), orDash(l.MAC), p.DHCP.Link, ends, orDash(l.Trouble)})
		}
		if flags := resolvers(p.DHCP.Leases); flags != "" {
			lines = append(lines, []string{fmt.Sprintf("the DHCP server on %s names resolvers, which Docker takes from no plugin; to use them: %s", p.DHCP.Link, flags)})
		}
		if c := p.DHCP.Counts; c.Silent+c.Refused+c.Expired > 0 {
			lines = append(lines, []string{fmt.Sprintf("! the DHCP server on %s, since the plugin started: %d extensions, %d not answered, %d refused; %d leases ended in use",
				p.DHCP.Link, c.Extended, c.Silent, c.Refused, c.Expired)})
		}
	}
	return append(rows, lines...)
}

func (d document) peers() [][]string {
	rows := [][]string{{"PEER", "ADDRESS", "STATE", "TUNNEL", "NETWORKS"}}
	for _, p := range d.Cluster.Peers {
		state, address := "heard", "-"
		if !p.Indirect.IsZero() {
			state = "heard only through others or TCP for " + d.ago(p.Indirect)
		}
		if deaf := d.Cluster.Deaf.Since; !deaf.IsZero() {
			state = "unknown for " + d.ago(deaf)
		}
		if !p.Silent.IsZero() {
			state = "silent for " + d.ago(p.Silent)
		}
		if p.Unheard {
			state = "silent, others told of it " + d.ago(p.Silent) + " ago"
		}
		if p.VTEP.IsValid() {
			address = p.VTEP.String()
		}
		var vnis []string
		for _, v := range p.Networks {
			vnis = append(vnis, fmt.Sprint(v))
		}
		tunnel := "-"
		if t := p.Tunnel; t != nil {
			tunnel = fmt.Sprintf("sent %d, received %d, answered %d", t.Sent, t.Received, t.Answered)
		}
		rows = append(rows, []string{orDash(p.Name), address, state, tunnel, list(vnis)})
	}
	if why := d.Cluster.Deaf.Error; why != "" {
		rows = append(rows, []string{"! other hosts are not heard: " + why})
	}
	for _, t := range d.Cluster.Troubles {
		rows = append(rows, []string{fmt.Sprintf("! %s, for %s: %s", t.Peer, d.ago(t.Since), t.Reason)})
	}
	for _, line := range d.Cluster.Conflicts {
		rows = append(rows, []string{"! " + line})
	}
	return rows
}

// drift says what repair found.
func (d document) drift() string {
	var b strings.Builder
	if d.Drift.Checked.IsZero() {
		b.WriteString("the kernel was not compared with the records yet\n")
	} else {
		fmt.Fprintf(&b, "the kernel was compared with the records %s ago\n", d.ago(d.Drift.Checked))
	}
	if len(d.Guard) > 0 {
		fmt.Fprintf(&b, "weft switched %s forwarding on: the host forwards for containers alone (FORWARD_GUARD=off: for everybody)\n", strings.Join(d.Guard, " and "))
	}
	if len(d.Unclaimed) > 0 {
		b.WriteString("in the kernel and in no record, left as it is (`weft network forget unclaimed` removes it):\n")
		for _, l := range d.Unclaimed {
			fmt.Fprintf(&b, "  %s\n", l)
		}
	}
	if d.Drift.Error != "" {
		fmt.Fprintf(&b, "not everything could be repaired: %s\n", d.Drift.Error)
	}
	if len(d.Drift.Repaired) > 0 {
		fmt.Fprintf(&b, "repaired %s ago:\n", d.ago(d.Drift.RepairedAt))
		for _, l := range d.Drift.Repaired {
			fmt.Fprintf(&b, "  %s\n", l)
		}
	}
	return b.String()
}

// short cuts an ID as the engine's own lists do.
func short(id string) string { return id[:min(len(id), 12)] }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func list(s []string) string { return orDash(strings.Join(s, ",")) }

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
