// Package ipam answers the engine's IPAM calls: it hands out pools (subnets)
// and addresses, and remembers on disk what it handed out.
//
// It owns the two address spaces, their pools, the addresses in them, the names
// that keep some of them, and leases. It never touches the kernel, never frees an
// address that it granted, and does not know what an endpoint is.
//
// # Words
//
// A space is local (pools of this host) or global (pools that the leader of a
// swarm hands out for all hosts). On a manager that also runs tasks the same
// subnet is in use in both at the same time, so they share nothing but that
// automatic pools avoid each other. A pool is one subnet of one space. A sub-pool
// (--ip-range) limits which addresses are chosen automatically, nothing else. A
// pool ID names space, pool and sub-pool and is all that the engine keeps, so
// it must mean the same for ever; one that we have lost is taken up again. Networks
// of one LAN may share a pool, each with a sub-pool of its own: see part.go.
//
// A shared space (space=NAME) has pools that all hosts of a cluster hand out
// addresses from. A host has a reference to each that it uses.
//
// # What is handed out twice
//
// Nothing, where a network is local to this host. In the global space, and on
// a host for the pool of a swarm network, the engine asks again for pools and
// addresses that it never released (after the leader changed; after a crash,
// because swarm networks are not stored): there the same pool, and the same
// explicit address, is granted again. So is, once, what was read from disk for
// a local pool that no network uses: the process died between the pool and
// the network.
//
// In the global space a new allocator of this host's names all that it knows
// before it asks for more. What it has not named is unconfirmed, and makes room
// for what it asks for: see epoch.go.
//
// # State
//
// One record for each pool and each address, written before the answer. What
// is chosen is marked in memory first, under the pool's lock, then written
// without any lock, so that concurrent requests on one pool share a sync. A write
// whose outcome is unknown, and a release that failed, leave the mark in place
// and put the address on a list that [IPAM.Run] works off: until its record is
// certainly gone nobody else gets the address.
//
// The records of a pool are in its home: this host's disk, or the store of the
// cluster. There every host has a view of what others have, which is late, and
// the write decides: see view.go and cluster.go. Until the store has answered
// once, requests for shared spaces fail; others do not wait for it.
//
// The lowest free address is chosen, but for one that was given back only just now,
// see back.go; in a swarm and in shared spaces the next one after the last, after a
// restart after the newest record. One that is kept for a name, or rests, is left
// alone as long as there is another: see rest.go and names.go. Automatic gateways are the
// first free address of the sub-pool if there is one, else of the pool.
//
// # Leases
//
// In a pool with DHCP the server chooses: see leases.go. A lease is asked for
// with no lock held, since nobody knows yet which address it will be; what is
// marked before is the station, so that no two requests ask as the same one. The
// record of the lease is written when the server has made its offer and before it is
// taken, then that of the address, and deleted in the reverse order: one alone was
// in flight when the process died, and is given back by Run, if no name keeps it.
// Until then its address counts as taken.
// Its space is that of the link, so that several networks may have the subnet.
//
// # Locks
//
// In this order: changes (a channel, because it is held across writes and its
// waiters' contexts must count) serialises making and dropping pools; mu guards
// the table of pools; each pool's mu guards that pool; queueMu guards the list
// of what Run has to do, and shared.mu what is known of writes to the cluster.
// No mutex is held during a write, nor while the driver or the kernel is asked
// something. epoch.mu, over what is confirmed, is taken alone or before mu.
//
// Entry points: [New], [IPAM.Load], [IPAM.Run], [IPAM.Register], [IPAM.Elected],
// [IPAM.Carry], [IPAM.Station], [IPAM.Status], [ParsePools].
package ipam
