package driver

import (
	"net/netip"

	"github.com/weftnet/weft/internal/datapath"
)

// Backend turns records into kernel objects for one value of -o mode=. It is
// pure: no I/O, no lock, no clock; the same records give the same State.
type Backend interface {
	// Validate checks the network's options against each other and fills in
	// defaults. It runs before anything is stored.
	Validate(*Network) error
	// Network is what exists while the network has no endpoints.
	Network(Network) datapath.State
	// Endpoint is what one endpoint adds.
	Endpoint(Network, Endpoint) datapath.State
	// Attach is the answer to Join.
	Attach(Network, Endpoint) Attachment
}

// Attachment is what the engine does with an endpoint's interface.
type Attachment struct {
	Link     string // interface to move into the container
	Prefix   string // its name there, without the number
	Name     string // its whole name there, for engines that take one; "" if it does not matter
	Gateways []netip.Addr
	Routes   []Route
	// NoGateway tells the engine not to add docker_gwbridge.
	NoGateway bool
}

// Route is a static route inside the container. A zero NextHop makes
// Destination directly connected.
type Route struct {
	Destination netip.Prefix
	NextHop     netip.Addr
}
