//go:build e2e

package e2e

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// tunnelEnd is one host's place on an overlay network.
type tunnelEnd struct {
	bridge, device string
	local          netip.Addr // on the underlay
	mtu            int
}

// overlay reads from the kernel where a host reaches others from.
func (e *engine) overlay(tb testing.TB, network string) tunnelEnd {
	tb.Helper()
	link, err := e.linkOf(network)
	if err != nil || link == "" {
		tb.Fatalf("%s has no network %s: %v", e.name, network, err)
	}
	t := tunnelEnd{bridge: link, device: "wfx" + strings.TrimPrefix(link, "wfb")}
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

// agree waits until every host has what leads to the containers that run on the
// others, and nothing else.
func (all members) agree(tb testing.TB, network string) {
	tb.Helper()
	all.exact(tb, network, 5*time.Second)
}
