//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// tunnelEnd is one host's place on an overlay network.
type tunnelEnd struct {
	bridge, device string
	local          netip.Addr // on the underlay
	mtu            int
	containers     []station
}

// station is what others need to know of a container.
type station struct {
	MAC   string
	Addrs []netip.Addr
}

// overlay reads from the engine who is on a network, and from the kernel where
// it reaches others from.
func (e *engine) overlay(tb testing.TB, network string) tunnelEnd {
	tb.Helper()
	format := `{{.Id}}{{range .Containers}}
{{.MacAddress}} {{.IPv4Address}} {{.IPv6Address}}{{end}}`
	lines := strings.Split(e.must(tb, "network", "inspect", "-f", format, network), "\n")
	s, err := e.status(tb)
	if err != nil {
		tb.Fatal(err)
	}
	var t tunnelEnd
	for _, n := range s.Networks {
		if n.ID == lines[0] {
			t = tunnelEnd{bridge: n.Link, device: "wfx" + strings.TrimPrefix(n.Link, "wfb")}
		}
	}
	for _, l := range lines[1:] {
		f := strings.Fields(l)
		s := station{MAC: f[0]}
		for _, p := range f[1:] {
			s.Addrs = append(s.Addrs, netip.MustParsePrefix(p).Addr())
		}
		t.containers = append(t.containers, s)
	}
	var links []struct {
		MTU  int
		Info struct {
			Data struct{ Local, Local6 string } `json:"info_data"`
		} `json:"linkinfo"`
	}
	if err := json.Unmarshal([]byte(e.net(tb, "ip", "-d", "-j", "link", "show", "dev", t.device)), &links); err != nil {
		tb.Fatal(err)
	}
	t.mtu = links[0].MTU
	if t.local, err = netip.ParseAddr(links[0].Info.Data.Local + links[0].Info.Data.Local6); err != nil {
		tb.Fatalf("%s: %s: %v", e.name, t.device, err)
	}
	return t
}

// entries is what leads from a host to others: a line for each entry of the
// device, of its bridge, and of the bridge's neighbours.
func (e *engine) entries(t tunnelEnd) ([]string, error) {
	var fdb []struct {
		MAC, Dst, Master, State string
		Flags                   []string
	}
	out, err := output(e.inNet("bridge", "-j", "fdb", "show", "dev", t.device))
	if err == nil {
		err = json.Unmarshal([]byte(out), &fdb)
	}
	if err != nil {
		return nil, err
	}
	var list []string
	for _, x := range fdb {
		switch {
		case x.Dst != "":
			list = append(list, fmt.Sprintf("device %s to %s", x.MAC, x.Dst))
		case x.State != "permanent": // which is the device's own address
			list = append(list, fmt.Sprintf("bridge %s %s", x.MAC, x.State))
		}
	}
	var neigh []struct {
		Dst, LLAddr string
		State       []string
	}
	for _, family := range []string{"-4", "-6"} {
		out, err := output(e.inNet("ip", family, "-j", "neigh", "show", "dev", t.bridge, "nud", "permanent"))
		if err == nil {
			err = json.Unmarshal([]byte(out), &neigh)
		}
		if err != nil {
			return nil, err
		}
		for _, x := range neigh {
			list = append(list, fmt.Sprintf("neighbour %s at %s", x.Dst, x.LLAddr))
		}
	}
	return list, nil
}

// agree waits until every host has what leads to the containers that run on the
// others, and nothing else.
func (all members) agree(tb testing.TB, network string) {
	tb.Helper()
	all.agreeIn(tb, 5*time.Second, network)
}

func (all members) agreeIn(tb testing.TB, limit time.Duration, network string) {
	tb.Helper()
	ends := make([]tunnelEnd, len(all))
	for i, e := range all {
		ends[i] = e.overlay(tb, network)
	}
	for i, e := range all {
		var want []string
		for j, t := range ends {
			if j == i {
				continue
			}
			want = append(want, fmt.Sprintf("device 00:00:00:00:00:00 to %s", t.local))
			for _, s := range t.containers {
				want = append(want, fmt.Sprintf("device %s to %s", s.MAC, t.local), fmt.Sprintf("bridge %s static", s.MAC))
				for _, a := range s.Addrs {
					want = append(want, fmt.Sprintf("neighbour %s at %s", a, s.MAC))
				}
			}
		}
		eventually(tb, limit, fmt.Sprintf("%s has what leads to the others on %s", e.name, network), func() error {
			have, err := e.entries(ends[i])
			if err != nil {
				return err
			}
			return differ(have, want)
		})
	}
}

// differ says what is in one list and not in the other.
func differ(have, want []string) error {
	var errs []error
	for _, x := range want {
		if !slices.Contains(have, x) {
			errs = append(errs, errors.New("lacks "+x))
		}
	}
	for i, x := range have {
		if !slices.Contains(want, x) || slices.Contains(have[:i], x) {
			errs = append(errs, errors.New("should not have "+x))
		}
	}
	return errors.Join(errs...)
}
