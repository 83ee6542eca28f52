package plugin

import (
	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
)

// PathActivate is sent by the engine to unmanaged plugins only; every Mux
// answers it.
const PathActivate = "/Plugin.Activate"

// The calls of a network driver.
const (
	PathNetworkCapabilities = "/NetworkDriver.GetCapabilities"
	PathGwAllocCheck        = "/NetworkDriver.GwAllocCheck"
	PathAllocateNetwork     = "/NetworkDriver.AllocateNetwork"
	PathFreeNetwork         = "/NetworkDriver.FreeNetwork"
	PathCreateNetwork       = "/NetworkDriver.CreateNetwork"
	PathDeleteNetwork       = "/NetworkDriver.DeleteNetwork"
	PathCreateEndpoint      = "/NetworkDriver.CreateEndpoint"
	PathDeleteEndpoint      = "/NetworkDriver.DeleteEndpoint"
	PathEndpointOperInfo    = "/NetworkDriver.EndpointOperInfo"
	PathJoin                = "/NetworkDriver.Join"
	PathLeave               = "/NetworkDriver.Leave"
	PathProgramExternal     = "/NetworkDriver.ProgramExternalConnectivity"
	PathRevokeExternal      = "/NetworkDriver.RevokeExternalConnectivity"
	PathDiscoverNew         = "/NetworkDriver.DiscoverNew"
	PathDiscoverDelete      = "/NetworkDriver.DiscoverDelete"
)

// The calls of an IPAM driver.
const (
	PathIpamCapabilities = "/IpamDriver.GetCapabilities"
	PathAddressSpaces    = "/IpamDriver.GetDefaultAddressSpaces"
	PathRequestPool      = "/IpamDriver.RequestPool"
	PathReleasePool      = "/IpamDriver.ReleasePool"
	PathRequestAddress   = "/IpamDriver.RequestAddress"
	PathReleaseAddress   = "/IpamDriver.ReleaseAddress"
)

// Keys of the engine in Options.
const (
	// OptionGeneric holds what the user gave with -o, strings by name.
	OptionGeneric    = "com.docker.network.generic"
	OptionEnableIPv4 = "com.docker.network.enable_ipv4" // from 28.0; absent means true
	OptionEnableIPv6 = "com.docker.network.enable_ipv6"
	OptionInternal   = "com.docker.network.internal"
	// ParsePortMap reads these two.
	OptionPortMap      = "com.docker.network.portmap"
	OptionExposedPorts = "com.docker.network.endpoint.exposedports"
	// OptionMACAddress is base64 in CreateEndpoint, where Interface.MacAddress
	// says the same; it is text in RequestAddress.
	OptionMACAddress = "com.docker.network.endpoint.macaddress"
	// OptionEndpointName is the container's name, in RequestAddress from 29.0.
	OptionEndpointName = "com.docker.network.endpoint.name"
	// OptionIfName is the interface's name in the container, in CreateEndpoint.
	OptionIfName = "com.docker.network.endpoint.ifname"
	// OptionRequestAddressType with the value RequestAddressGateway marks the
	// request for a network's gateway.
	OptionRequestAddressType = "RequestAddressType"
	RequestAddressGateway    = "com.docker.network.gateway"
	// OptionSerial asks for next-free instead of lowest-free order.
	OptionSerial = "com.docker.network.ipam.serial"
)

// Kinds of StaticRoute in a JoinResponse.
const (
	RouteNextHop   = 0
	RouteConnected = 1
)

// DiscoverNode is the only DiscoveryType that reaches a remote driver.
const DiscoverNode = 1

// Empty is the answer to calls that have nothing to say.
type Empty struct{}

// Activation is the answer to PathActivate.
type Activation struct {
	Implements []string
}

// NetworkCapabilities is the answer to PathNetworkCapabilities.
type NetworkCapabilities struct {
	network.CapabilitiesResponse
	// GwAllocChecker asks engines from 28.0 on to send PathGwAllocCheck.
	GwAllocChecker bool
}

// IpamCapabilities is the answer to PathIpamCapabilities.
type IpamCapabilities struct {
	ipam.CapabilitiesResponse
	// RequiresRequestReplay asks the engine to repeat all requests when it
	// starts.
	RequiresRequestReplay bool
}

// GwAllocCheckRequest carries the Options of the CreateNetwork to come.
type GwAllocCheckRequest struct {
	Options map[string]any
}

// GwAllocCheckResponse says for which families the engine need not reserve
// a gateway address.
type GwAllocCheckResponse struct {
	SkipIPv4, SkipIPv6 bool
}

// CreateEndpointRequest, JoinRequest and ProgramExternalRequest are those of the
// helpers, with Options that may hold very many ports.
type (
	CreateEndpointRequest struct {
		NetworkID, EndpointID string
		Interface             *network.EndpointInterface
		Options               ContainerOptions
	}
	JoinRequest struct {
		NetworkID, EndpointID string
		SandboxKey            string
		Options               ContainerOptions
	}
	ProgramExternalRequest struct {
		NetworkID, EndpointID string
		Options               ContainerOptions
	}
)

// JoinResponse is network.JoinResponse with an InterfaceName that can be
// left out, which tells the engine to move no interface.
type JoinResponse struct {
	network.JoinResponse
	InterfaceName *InterfaceName `json:",omitempty"`
}

// InterfaceName is network.InterfaceName with the whole name in the container:
// engines before 29.8 ignore it, and add the first free number to DstPrefix.
type InterfaceName struct {
	network.InterfaceName
	DstName string `json:",omitempty"`
}

// EndpointInfoResponse is the answer to PathEndpointOperInfo; values may be
// of any type.
type EndpointInfoResponse struct {
	Value map[string]any
}

// DiscoveryNotification is network.DiscoveryNotification with the data of
// DiscoverNode.
type DiscoveryNotification struct {
	DiscoveryType int
	DiscoveryData NodeDiscovery
}

// NodeDiscovery is one host of a swarm.
type NodeDiscovery struct {
	Address     string
	BindAddress string
	Self        bool
}
