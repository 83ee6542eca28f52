//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// exact waits until each host has exactly the entries that lead to the live
// containers that the engines of the others show, and returns how long that took.
func (all members) exact(tb testing.TB, network string, limit time.Duration) time.Duration {
	tb.Helper()
	start := time.Now()
	eventually(tb, limit, "entries of network "+network, func() error { return all.inexact(tb, network) })
	return time.Since(start).Round(100 * time.Millisecond)
}

func (all members) inexact(tb testing.TB, network string) error {
	tb.Helper()
	want, err := all.wanted(tb, network)
	if err != nil {
		return err
	}
	var wrong []error
	for i, e := range all {
		have, err := e.entries(tb, network)
		if err != nil {
			return err
		}
		for _, x := range want[i] {
			if !slices.Contains(have, x) {
				wrong = append(wrong, fmt.Errorf("%s has not: %s", e.name, x))
			}
		}
		for _, x := range have {
			if !slices.Contains(want[i], x) {
				wrong = append(wrong, fmt.Errorf("%s has too much: %s", e.name, x))
			}
		}
	}
	return errors.Join(wrong...)
}

// attached is a running container, as its engine shows it on one network.
type attached struct {
	host    int
	started time.Time
	mac     string
	addrs   []string
}

// wanted are the entries that each host should have. Where two containers have
// one address or MAC, the one that was started later does.
func (all members) wanted(tb testing.TB, network string) ([][]string, error) {
	tb.Helper()
	var list []attached
	var there []int // hosts that have the network
	vteps := map[int]string{}
	for i, e := range all {
		found, has, err := e.attachedTo(network)
		if err != nil {
			return nil, err
		}
		if has {
			there = append(there, i)
			vteps[i] = e.overlay(tb, network).local.String()
		}
		for _, a := range found {
			a.host = i
			list = append(list, a)
		}
	}
	slices.SortFunc(list, func(a, b attached) int { return a.started.Compare(b.started) })
	byMAC, byAddr := map[string]attached{}, map[string]attached{}
	for _, a := range list {
		byMAC[a.mac] = a
		for _, addr := range a.addrs {
			byAddr[addr] = a
		}
	}
	want := make([][]string, len(all))
	for _, i := range there {
		for _, j := range there {
			if i != j {
				want[i] = append(want[i], "flood "+vteps[j])
			}
		}
		for mac, a := range byMAC {
			if a.host != i {
				want[i] = append(want[i], "tunnel "+mac+" to "+vteps[a.host], "port "+mac)
			}
		}
		for addr, a := range byAddr {
			if a.host != i {
				want[i] = append(want[i], "neighbour "+addr+" is "+a.mac)
			}
		}
	}
	return want, nil
}

// vtep is the address that others know the host by.
func (e *engine) vtep() string {
	addr, _, _ := strings.Cut(e.addrs[0], "/")
	return addr
}

// attachedTo is what the engine says that runs on a network here. A node of a
// swarm has a network while a task of it is there.
func (e *engine) attachedTo(network string) (list []attached, has bool, err error) {
	out, err := e.docker("ps", "-q", "--no-trunc", "--filter", "network="+network)
	if err != nil {
		return nil, false, err
	}
	ids := strings.Fields(out)
	if len(ids) > 0 {
		format := fmt.Sprintf("{{.State.StartedAt}} {{with index .NetworkSettings.Networks %q}}{{.MacAddress}} {{.IPAddress}} {{.GlobalIPv6Address}}{{end}}", network)
		if out, err = e.docker(slices.Concat([]string{"inspect", "-f", format}, ids)...); err != nil {
			return nil, false, err
		}
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if len(f) < 3 {
				return nil, false, fmt.Errorf("container on %s is not all there yet: %s", e.name, line)
			}
			started, err := time.Parse(time.RFC3339Nano, f[0])
			if err != nil {
				return nil, false, err
			}
			list = append(list, attached{started: started, mac: f[1], addrs: f[2:]})
		}
	}
	link, err := e.linkOf(network)
	if err != nil {
		return nil, false, err
	}
	return list, link != "", nil
}

// linkOf is the bridge of a network, "" where the host has none.
func (e *engine) linkOf(network string) (string, error) {
	id, err := e.docker("network", "ls", "-q", "--no-trunc", "--filter", "name=^"+network+"$")
	if err != nil || id == "" {
		return "", err
	}
	s, err := e.pluginStatus()
	if err != nil {
		return "", err
	}
	for _, n := range s.Networks {
		if n.ID == id {
			return n.Link, nil
		}
	}
	return "", nil
}

// pluginStatus is status without a test to fail.
func (e *engine) pluginStatus() (s status, err error) {
	id, err := e.docker("plugin", "inspect", "-f", "{{.ID}}", e.plugin)
	if err != nil {
		return s, err
	}
	out, err := output(e.inside(suite.weft, "status", "--json", "--socket", filepath.Join(e.data(), "plugins", id, "propagated-mount/admin.sock")))
	if err != nil && out == "" { // it also says by its exit code that something is wrong
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// entries are the host's, of the network's tunnel and its bridge.
func (e *engine) entries(tb testing.TB, network string) ([]string, error) {
	tb.Helper()
	link, err := e.linkOf(network)
	if err != nil || link == "" {
		return nil, err
	}
	var fdb []struct {
		MAC, Dst, Master, State string
		Flags                   []string
	}
	out, err := output(e.inNet("bridge", "-j", "fdb", "show", "dev", "wfx"+strings.TrimPrefix(link, "wfb")))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(out), &fdb); err != nil {
		return nil, err
	}
	all := map[string]bool{}
	for _, x := range fdb {
		switch {
		case x.Dst != "" && x.MAC == "00:00:00:00:00:00":
			all["flood "+x.Dst] = true
		case x.Dst != "":
			all["tunnel "+x.MAC+" to "+x.Dst] = true
		case x.Master != "" && x.State != "permanent": // those are the device's own
			all["port "+x.MAC] = true
		}
	}
	var neighbours []struct {
		Dst, LLAddr string
		State       []string
	}
	if out, err = output(e.inNet("ip", "-j", "neigh", "show", "dev", link)); err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(out), &neighbours); err != nil {
		return nil, err
	}
	for _, x := range neighbours {
		if slices.Contains(x.State, "PERMANENT") { // the host may ask for others itself
			all["neighbour "+x.Dst+" is "+x.LLAddr] = true
		}
	}
	return slices.Sorted(maps.Keys(all)), nil
}

// peers is what "weft status peers" prints.
func (e *engine) peers(tb testing.TB) (string, error) {
	tb.Helper()
	out, err := output(e.inside(suite.weft, "status", "--socket", filepath.Join(e.state(tb), "admin.sock"), "peers"))
	if out != "" {
		err = nil // it also says by its exit code that something is wrong
	}
	return out, err
}

// hears waits until the host shows another one in a state, "heard" or "silent",
// and returns how long that took.
func (e *engine) hears(tb testing.TB, name, state string, limit time.Duration) time.Duration {
	tb.Helper()
	start := time.Now()
	eventually(tb, limit, fmt.Sprintf("%s is %s on %s", name, state, e.name), func() error {
		out, err := e.peers(tb)
		if err != nil {
			return err
		}
		n := 0
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) > 2 && f[0] == name {
				if n++; f[2] != state {
					return errors.New(line)
				}
			}
		}
		if n != 1 {
			return fmt.Errorf("%s is listed %d times:\n%s", name, n, out)
		}
		return nil
	})
	return time.Since(start).Round(100 * time.Millisecond)
}
