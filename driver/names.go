package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"

	"github.com/weftnet/weft/internal/datapath"
)

// Names are derived, not stored, and 15 bytes long, the most that the kernel
// takes.
const (
	bridgePrefix = "wfb"
	hostPrefix   = "wfv"
	peerPrefix   = "wfc"
	dummyPrefix  = "wfd"
	nameDigits   = 12
)

// bridgeName is the bridge of a network that names none itself.
func bridgeName(networkID string) string { return bridgePrefix + digits(networkID) }

// hostEnd and peerEnd are the two ends of an endpoint's veth pair.
func hostEnd(endpointID string) string { return hostPrefix + digits(endpointID) }
func peerEnd(endpointID string) string { return peerPrefix + digits(endpointID) }

// ownLink is the host's own sub-interface on a network's parent, dummyName the
// parent of a network that names none.
func ownLink(networkID string) string   { return datapath.StaysPrefix + digits(networkID) }
func dummyName(networkID string) string { return dummyPrefix + digits(networkID) }

// digits is the short form of an ID that the engine prints, so that people
// find the link. Swarm's IDs are base 36 and share long prefixes when they were
// made at about the same time: those are hashed.
func digits(id string) string {
	if len(id) >= 2*nameDigits && isHex(id) {
		return id[:nameDigits]
	}
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])[:nameDigits]
}

func isHex(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// bridgeMAC never changes, so that neighbours of containers stay valid when
// the bridge has to be made again, and repair can compare it.
func bridgeMAC(networkID string) datapath.MAC { return hashMAC("bridge " + networkID) }

// endpointMAC follows the address, so that a container that comes back with
// its address is known to its neighbours' caches: the built-in bridge's form
// for IPv4, a hash for the rest.
func endpointMAC(endpointID string, addrs []netip.Prefix) datapath.MAC {
	for _, a := range addrs {
		if a.Addr().Is4() {
			b := a.Addr().As4()
			return datapath.MAC{0x02, 0x42, b[0], b[1], b[2], b[3]}
		}
	}
	for _, a := range addrs {
		return hashMAC("address " + a.Addr().String())
	}
	return hashMAC("endpoint " + endpointID)
}

// hashLinkLocal is an address of 169.254.0.0/16 (RFC 3927) without its first and
// last 256, which are reserved.
func hashLinkLocal(s string) netip.Addr {
	sum := sha256.Sum256([]byte(s))
	return netip.AddrFrom4([4]byte{169, 254, 1 + sum[8]%254, sum[9]})
}

// hashULA is an address of fd00::/8 (RFC 4193).
func hashULA(s string) netip.Addr {
	sum := sha256.Sum256([]byte(s))
	a := [16]byte(sum[16:])
	a[0] = 0xfd
	return netip.AddrFrom16(a)
}

// hashMAC is a unicast address from the range that anybody may use.
func hashMAC(s string) datapath.MAC {
	sum := sha256.Sum256([]byte(s))
	m := datapath.MAC(sum[:6])
	m[0] = m[0]&^0x01 | 0x02
	return m
}
