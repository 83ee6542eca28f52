package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/ipam"
)

// learnt is what a lease says beside the address, in the driver's words.
func learnt(l dhcp.Lease, ok bool) (driver.Learnt, bool) {
	out := driver.Learnt{MTU: l.MTU, More: l.MoreRoutes}
	for _, r := range l.Routes {
		to := driver.Route{Destination: r.To}
		if !r.Via.IsUnspecified() {
			to.NextHop = r.Via
		}
		out.Routes = append(out.Routes, to)
	}
	return out, ok
}

// resolvers are the name servers and domains that a pool's server tells, each once,
// as somebody would give them to a container; "" for none.
func resolvers(leases []ipam.LeaseStatus) string {
	var flags []string
	add := func(flag, v string) {
		if v != "" && !slices.Contains(flags, flag+v) {
			flags = append(flags, flag+v)
		}
	}
	for _, l := range leases {
		for _, a := range l.Lease.DNS {
			add("--dns ", a.String())
		}
	}
	for _, l := range leases {
		for _, d := range append(slices.Clone(l.Lease.Search), l.Lease.Domain) {
			add("--dns-search ", d)
		}
	}
	if more := len(flags) - mostResolvers; more > 0 {
		flags = append(flags[:mostResolvers], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(flags, " ")
}

// mostResolvers bounds a line of status.
const mostResolvers = 12
