//go:build e2e

package main

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// iface is what a test may want to know of one interface.
type iface struct {
	Name        string   `json:"name"`
	MTU         int      `json:"mtu"`
	MAC         string   `json:"mac"`
	Up          bool     `json:"up"`
	Promiscuous bool     `json:"promiscuous"`
	Addrs       []string `json:"addrs"`
	Routes      []string `json:"routes"`
}

func facts() ([]iface, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var out []iface
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 {
			continue
		}
		f := iface{Name: a.Name, MTU: a.MTU, MAC: a.HardwareAddr.String(), Up: a.Flags&net.FlagUp != 0, Promiscuous: a.Promisc != 0}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, x := range addrs {
			if !x.IP.IsLinkLocalUnicast() {
				f.Addrs = append(f.Addrs, x.IPNet.String())
			}
		}
		routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			if r.Dst != nil && (r.Dst.IP.IsLinkLocalUnicast() || r.Dst.IP.IsMulticast()) {
				continue
			}
			t := "default"
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
				t = r.Dst.String()
			}
			if r.Gw != nil {
				t = fmt.Sprintf("%s via %s", t, r.Gw)
			}
			f.Routes = append(f.Routes, t)
		}
		out = append(out, f)
	}
	return out, nil
}
