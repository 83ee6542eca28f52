package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

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
}

// print writes the sections asked for, or all of them, for people.
func (d document) print(w io.Writer, words []string) error {
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
		{"networks", d.networks()}, {"endpoints", d.endpoints()}, {"pools", d.pools()}, {"names", d.names()}, {"peers", d.peers()},
	} {
		asked := slices.Contains(words, section.name) || section.name == "names" && slices.Contains(words, "pools")
		empty := (section.name == "peers" && all || section.name == "names") && len(section.rows) == 1
		if !all && !asked || empty {
			continue
		}
		if all || section.name == "names" {
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
	rows := [][]string{{"NETWORK", "MODE", "VNI", "LINK", "SUBNETS", "GATEWAYS", "MTU", "EGRESS", "INTERNAL", "ENDPOINTS"}}
	for _, n := range d.Networks {
		vni := "-"
		if n.VNI != 0 {
			vni = fmt.Sprint(n.VNI)
		}
		var pools, gateways []string
		for _, s := range n.Subnets {
			pools = append(pools, s.Pool.String())
			gateways = append(gateways, orDash(s.Gateway))
		}
		rows = append(rows, []string{
			short(n.ID), n.Mode, vni, orDash(n.Link), list(pools), list(gateways), fmt.Sprint(n.MTU), string(n.Egress), yesNo(n.Internal), fmt.Sprint(n.Endpoints),
		})
		if n.Warning != "" {
			lines = append(lines, []string{fmt.Sprintf("! network %s: %s", short(n.ID), n.Warning)})
		}
	}
	return append(rows, lines...)
}

func (d document) endpoints() [][]string {
	rows := [][]string{{"ENDPOINT", "NETWORK", "ADDRESSES", "MAC", "LINK", "STATE", "PORTS"}}
	for _, e := range d.Endpoints {
		var addrs, ports []string
		for _, a := range e.Addrs {
			addrs = append(addrs, a.Addr().String())
		}
		for _, p := range e.Ports {
			ports = append(ports, port(p))
		}
		rows = append(rows, []string{
			short(e.ID), short(e.Network), list(addrs), orDash(e.MAC.String()), e.Link, e.State, list(ports),
		})
	}
	return rows
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
	for _, p := range d.Pools {
		all := "-" // a pool of this host
		if p.UsedByAll > 0 {
			all = fmt.Sprint(p.UsedByAll)
		}
		rows = append(rows, []string{p.Pool, p.Space, orDash(p.SubPool), orDash(p.Gateway), fmt.Sprint(p.Used), all, p.Size})
	}
	return rows
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
				state = "kept, released " + n.Released.UTC().Format(time.RFC3339)
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

func (d document) peers() [][]string {
	rows := [][]string{{"PEER", "ADDRESS", "STATE", "NETWORKS"}}
	for _, p := range d.Cluster.Peers {
		state, address := "heard", "-"
		if deaf := d.Cluster.Deaf.Since; !deaf.IsZero() {
			state = "unknown since " + deaf.UTC().Format(time.RFC3339)
		}
		if !p.Silent.IsZero() {
			state = "silent since " + p.Silent.UTC().Format(time.RFC3339)
		}
		if p.VTEP.IsValid() {
			address = p.VTEP.String()
		}
		var vnis []string
		for _, v := range p.Networks {
			vnis = append(vnis, fmt.Sprint(v))
		}
		rows = append(rows, []string{orDash(p.Name), address, state, list(vnis)})
	}
	if why := d.Cluster.Deaf.Error; why != "" {
		rows = append(rows, []string{"! other hosts are not heard: " + why})
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
		fmt.Fprintf(&b, "the kernel was compared with the records at %s\n", d.Drift.Checked.Format(time.RFC3339))
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
		fmt.Fprintf(&b, "repaired at %s:\n", d.Drift.RepairedAt.Format(time.RFC3339))
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
