//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"
)

// repair damages what leads to others on all three hosts and waits for one
// period.
func (all members) repair(t *testing.T, list []box) {
	t.Helper()
	ends := make([]tunnelEnd, len(all))
	for i, e := range all {
		ends[i] = e.overlay(t, "blue")
	}
	far, _, err := all[0].attachedTo("blue") // two
	if err != nil {
		t.Fatal(err)
	}
	near, _, err := all[2].attachedTo("blue")
	if err != nil {
		t.Fatal(err)
	}
	to := ends[0].local.String()
	damaged := time.Now()

	all[0].net(t, "ip", "link", "del", ends[0].device)

	e, x := all[1], ends[1]
	e.net(t, "bridge", "fdb", "del", far[0].mac, "dev", x.device, "dst", to, "self")
	e.net(t, "bridge", "fdb", "del", far[1].mac, "dev", x.device, "master")
	e.net(t, "bridge", "fdb", "del", "00:00:00:00:00:00", "dev", x.device, "dst", to, "self")
	e.net(t, "bridge", "fdb", "replace", near[0].mac, "dev", x.device, "dst", to, "self", "static")
	e.net(t, "bridge", "fdb", "add", "02:00:00:00:77:77", "dev", x.device, "dst", to, "self", "static")
	e.net(t, "ip", "neigh", "del", far[0].addrs[0], "dev", x.bridge)
	e.net(t, "ip", "neigh", "replace", far[1].addrs[1], "lladdr", "02:00:00:00:77:77", "dev", x.bridge, "nud", "permanent")
	e.net(t, "ip", "neigh", "add", "10.44.77.77", "lladdr", "02:00:00:00:77:77", "dev", x.bridge, "nud", "permanent")
	e.net(t, "bridge", "link", "set", "dev", x.device, "learning", "on", "neigh_suppress", "off")

	e, x = all[2], ends[2]
	e.net(t, "ip", "link", "set", x.device, "nomaster")
	e.net(t, "nft", "delete", "table", "netdev", "weft")

	for i, e := range all {
		eventually(t, repairTime, e.name+": the tunnel is as it was", func() error { return e.tunnelFit(ends[i]) })
	}
	all.agree(t, "blue")
	note("overlay: damage on three hosts mended after %v", time.Since(damaged).Round(time.Second))
	reachAll(t, list)
	for i, words := range [][]string{
		{"vxlan " + ends[0].device + ": made in", "forwarding entries"},
		{"vxlan " + ends[1].device + ": ", "forwarding entries", "neighbours", "learning off", "02:00:00:00:77:77", "10.44.77.77"},
		{ends[2].device, "shortcuts past the bridge"},
	} {
		all[i].checkLog(t, damaged, words...)
	}
}

// tunnelFit says what is not as we set it in the tunnel's device.
func (e *engine) tunnelFit(end tunnelEnd) error {
	var links []struct {
		Master string
		Flags  []string
		Info   struct {
			Data  struct{ Learning bool } `json:"info_data"`
			Slave struct {
				Learning bool `json:"learning"`
				Suppress bool `json:"neigh_suppress"`
			} `json:"info_slave_data"`
		} `json:"linkinfo"`
	}
	out, err := output(e.inNet("ip", "-d", "-j", "link", "show", "dev", end.device))
	if err == nil {
		err = json.Unmarshal([]byte(out), &links)
	}
	if err != nil {
		return err
	}
	l := links[0]
	if l.Master != end.bridge {
		return fmt.Errorf("%s is in %q, not in %s", end.device, l.Master, end.bridge)
	}
	if l.Info.Data.Learning || l.Info.Slave.Learning || !l.Info.Slave.Suppress {
		return errors.New("it learns, or does not suppress: " + out)
	}
	return nil
}
