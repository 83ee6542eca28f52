// Package datapath makes the kernel equal to a [State].
//
// It owns the links of this instance (known by their link group, [Group] for the
// default one) with their addresses,
// sysctls, forwarding and neighbour entries, the nftables tables "weft" (inet, and netdev for shortcuts),
// the one rule in chains of others (the hook), and the sockets that hold published ports with the proxy behind
// them. Nobody else in this module talks to the kernel.
//
// It never knows what a record, a network or a container is, never enters a
// container's namespace, never changes a link without our group or a bridge
// marked Existing, and never switches forwarding off.
//
// Everything that depends on the namespace (netlink and nftables sockets) is
// opened in [New] by the calling thread; held ports, probes and sysctls belong to the
// thread that calls. Outside tests there is one namespace, the host's.
//
// Locking: none that a caller sees. A netlink socket serves one request at a
// time, deletions have a pool of them, sockets and forwarding have a mutex
// each. Two calls about the same object must not overlap; the driver's lock
// per network sees to that. The only lasting goroutines are the proxies', and
// they end with their socket.
//
// Entry points: [Acquire], which keeps a second process of the same instance out;
// [Kernel.Ensure], [Kernel.Remove], [Kernel.Owned], [Kernel.Reserve];
// [Kernel.InUse], [Kernel.PathMTU], [Kernel.Underlay], [Kernel.Link] and
// [Kernel.Probe] answer questions about the host and its LAN; [Kernel.Announce]
// tells the LAN.
package datapath
