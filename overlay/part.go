package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

// Part is what one host has of one network.
type Part struct {
	Host    string `json:"host"`    // the host's ID
	Name    string `json:"name"`    // its host name, for people
	VNI     uint32 `json:"vni"`     // VXLAN network identifier, 1 to 2^24-1 (RFC 7348 §4)
	Version uint64 `json:"version"` // grows with every change
	// Gone is set in the last Part that a host writes of a network.
	Gone bool `json:"gone,omitempty"`
	// VTEP is the host's address on the underlay, Port its UDP port there.
	VTEP    netip.Addr     `json:"vtep,omitzero"`
	Port    uint16         `json:"port,omitempty"`
	MTU     int            `json:"mtu,omitempty"` // bytes, inside containers
	Subnets []netip.Prefix `json:"subnets,omitempty"`
	// Ranges are what the host chooses addresses from: parts of Subnets. Absent
	// where that is not known, and where hosts choose together.
	Ranges []netip.Prefix `json:"ranges,omitempty"`
	// Endpoints are sorted by MAC.
	Endpoints []Endpoint `json:"endpoints,omitempty"`
}

// Endpoint is a container's place on a network, as other hosts see it.
type Endpoint struct {
	MAC   datapath.MAC `json:"mac"`
	Addrs []netip.Addr `json:"addrs,omitempty"`
	// Claim orders endpoints that claim one address or MAC: the highest wins
	// on every host alike.
	Claim uint64 `json:"claim"`
}

// maxVNI is the highest of 24 bits.
const maxVNI = 1<<24 - 1

// mostEndpoints is how many ports a bridge has, one of which is the tunnel.
const mostEndpoints = 1022

// mostSubnets is more than an engine gives to a network, which is one of each
// family.
const mostSubnets = 16

// ahead is by how much a version or claim of another host may be later than this
// host's clock. Whatever is believed has to be outdone by the next one, so one
// that is believed from the end of all time would be the last.
const ahead = time.Hour

// latest is the highest version or claim that is believed now.
func latest(now time.Time) uint64 { return uint64(max(now.Add(ahead).UnixNano(), 0)) }

// errAhead is returned for what is later than that.
var errAhead = errors.New("the clocks of the two hosts differ by more than an hour")

// check refuses what no host of ours would say until the time that latest gives.
func (p Part) check(until uint64) error {
	switch {
	case !isID(p.Host) || len(p.Name) > mostName:
		return errors.New("part of no host")
	case p.VNI == 0 || p.VNI > maxVNI:
		return fmt.Errorf("part of %s: VNI %d is not one of 1 to %d", p.Host, p.VNI, maxVNI)
	case p.Version > until:
		return fmt.Errorf("part of %s: version %d: %w", p.Host, p.Version, errAhead)
	case p.Gone:
		return nil
	case !p.VTEP.IsValid() || p.VTEP.IsUnspecified() || p.VTEP.IsMulticast() || p.VTEP.Is4In6():
		return fmt.Errorf("part of %s: %s is not the address of a host", p.Host, p.VTEP)
	case p.MTU < 0 || p.MTU > 1<<16-1 || len(p.Subnets) > mostSubnets:
		return fmt.Errorf("part of %s: MTU %d and %d subnets are not a network's", p.Host, p.MTU, len(p.Subnets))
	case len(p.Endpoints) > mostEndpoints:
		return fmt.Errorf("part of %s: %d endpoints are more than a bridge has ports", p.Host, len(p.Endpoints))
	}
	if err := p.checkRanges(); err != nil {
		return err
	}
	for _, e := range p.Endpoints {
		if e.MAC == (datapath.MAC{}) || e.MAC[0]&1 != 0 || len(e.Addrs) > 2 {
			return fmt.Errorf("part of %s: endpoint %s is not one", p.Host, e.MAC)
		}
		if e.Claim > until {
			return fmt.Errorf("part of %s: claim %d of endpoint %s: %w", p.Host, e.Claim, e.MAC, errAhead)
		}
		for _, a := range e.Addrs {
			if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" || a.Is4In6() {
				return fmt.Errorf("part of %s: endpoint %s has the address %q", p.Host, e.MAC, a)
			}
		}
	}
	return nil
}

// checkRanges refuses ranges that are no part of the network's subnets.
func (p Part) checkRanges() error {
	if len(p.Ranges) > mostSubnets {
		return fmt.Errorf("part of %s: %d ranges are more than a network has subnets", p.Host, len(p.Ranges))
	}
	for _, r := range p.Ranges {
		within := func(s netip.Prefix) bool { return s.Bits() <= r.Bits() && s.Contains(r.Addr()) }
		if !r.IsValid() || r != r.Masked() || !slices.ContainsFunc(p.Subnets, within) {
			return fmt.Errorf("part of %s: range %s is no part of %s", p.Host, r, join(p.Subnets))
		}
	}
	return nil
}

// overlap is a range of this host, p, that shares addresses with one of another, if
// there is one.
func (p Part) overlap(o Part) (mine, theirs netip.Prefix, ok bool) {
	for _, mine := range p.Ranges {
		for _, theirs := range o.Ranges {
			if mine.Overlaps(theirs) {
				return mine, theirs, true
			}
		}
	}
	return mine, theirs, false
}

// isID reports whether s can be a host's ID, which is printed as it is.
func isID(s string) bool {
	return s != "" && len(s) <= mostID && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '/' })
}

// same reports whether two parts say the same, but for their versions.
func (p Part) same(o Part) bool {
	return p.Host == o.Host && p.Name == o.Name && p.VNI == o.VNI && p.Gone == o.Gone && p.fits(o) == nil &&
		p.VTEP == o.VTEP && slices.Equal(p.Ranges, o.Ranges) && slices.EqualFunc(p.Endpoints, o.Endpoints, Endpoint.same)
}

func (e Endpoint) same(o Endpoint) bool {
	return e.MAC == o.MAC && e.Claim == o.Claim && slices.Equal(e.Addrs, o.Addrs)
}

// fits says in what two parts of one network contradict each other.
func (p Part) fits(o Part) error {
	switch {
	case !slices.Equal(p.Subnets, o.Subnets):
		return fmt.Errorf("subnet %s, and here %s", join(o.Subnets), join(p.Subnets))
	case p.Port != o.Port:
		return fmt.Errorf("port %d, and here %d", o.Port, p.Port)
	case p.MTU != o.MTU:
		return fmt.Errorf("mtu %d, and here %d", o.MTU, p.MTU)
	}
	return nil
}

func join(list []netip.Prefix) string {
	if len(list) == 0 {
		return "none"
	}
	var text []string
	for _, p := range list {
		text = append(text, p.String())
	}
	return strings.Join(text, ", ")
}
