//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestOverlayIPv6 is three hosts whose tunnels are IPv6, on a LAN that has both.
func TestOverlayIPv6(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	for i, e := range all {
		_, own := e.hostAddrs()
		_, peer := all[(i+1)%len(all)].hostAddrs()
		if i == 0 {
			peer = "[" + peer + "]:7947"
		}
		e.count(t, "meta", "nfproto", "ipv4", "udp", "dport", "4793")
		e.installPlugin(t, "PEERS="+peer, "SECRET="+secret, "UNDERLAY="+own)
	}
	all.network(t, "blue")
	list := all.boxes(t, "blue")
	reachAll(t, list)
	manyOnce(t, list)
	all.agree(t, "blue")
	for _, e := range all {
		_, own := e.hostAddrs()
		if got := e.overlay(t, "blue").local.String(); got != own {
			t.Errorf("%s: the tunnel is at %s, want %s", e.name, got, own)
		}
		if e.counted(t) {
			t.Errorf("%s got a tunnel's packets by IPv4", e.name)
		}
	}
	t.Run("mtu", func(t *testing.T) { all[:2].mtus(t, 70) })
	all.end(t)
}

// TestOverlayBeside is a swarm of two hosts with a network of the built-in
// overlay, and one of ours with the same VNI.
func TestOverlayBeside(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 2)
	manager, worker := all[0], all[1]
	manager.must(t, "swarm", "init", "--advertise-addr", underlayAddr(1))
	worker.must(t, "swarm", "join", "--advertise-addr", underlayAddr(2), "--token", manager.must(t, "swarm", "join-token", "-q", "worker"), underlayAddr(1)+":2377")
	all.join(t)
	manager.must(t, "network", "create", "-d", "overlay", "--attachable", "--subnet", "10.48.0.0/16", "theirs")
	vni := manager.must(t, "network", "inspect", "-f", `{{index .Options "com.docker.network.driver.overlay.vxlanid_list"}}`, "theirs")
	var foreign, own []box
	for _, e := range all {
		e.must(t, e.overlayArgs("ours", 49, "-o", "vni="+vni)...)
	}
	for _, e := range all {
		e.run(t, "their-"+e.name, "--network", "theirs")
		e.run(t, "our-"+e.name, "--network", "ours")
		foreign = append(foreign, box{e, "their-" + e.name, e.addresses(t, "their-"+e.name, "theirs")})
		own = append(own, box{e, "our-" + e.name, e.addresses(t, "our-"+e.name, "ours")})
	}
	check := func() {
		reachAll(t, foreign)
		reachAll(t, own)
		all.agree(t, "ours")
	}
	check()
	for _, e := range all {
		if err := e.hasVNI(vni); err != nil {
			t.Error(err)
		}
	}
	// Their devices come and go with their containers, ours stay.
	manager.must(t, "rm", "-f", foreign[0].name)
	reachAll(t, own)
	manager.run(t, foreign[0].name, "--network", "theirs")
	foreign[0].addrs = manager.addresses(t, foreign[0].name, "theirs")
	check()
	for _, b := range foreign {
		b.e.must(t, "rm", "-f", b.name)
	}
	all.end(t)
	eventually(t, 20*time.Second, "remove the network of the built-in overlay", func() error {
		_, err := manager.docker("network", "rm", "theirs")
		return err
	})
	worker.must(t, "swarm", "leave")
	manager.must(t, "swarm", "leave", "--force")
}

// hasVNI fails unless our device has the VNI.
func (e *engine) hasVNI(vni string) error {
	out, err := output(e.inNet("ip", "-d", "-j", "link", "show", "type", "vxlan"))
	if err != nil {
		return err
	}
	var links []struct {
		Name string `json:"ifname"`
		Info struct {
			Data struct{ ID, Port int } `json:"info_data"`
		} `json:"linkinfo"`
	}
	if err := json.Unmarshal([]byte(out), &links); err != nil {
		return err
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, "wfx") && fmt.Sprint(l.Info.Data.ID) == vni && l.Info.Data.Port != 4789 {
			return nil
		}
	}
	return errors.New(e.name + ": no device of ours with VNI " + vni + " in " + out)
}
