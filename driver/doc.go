// Package driver is the network driver: networks, endpoints and published
// ports, their records, and their life from create to delete.
//
// It owns the records in both stores, the options that users type, the
// choice of link names and MAC addresses, and repair. It never touches the
// kernel itself: a [Backend] turns records into a [datapath.State], and a
// kernel makes it so. Create, restart and repair are the same three steps.
//
// Order: a create writes the record, then changes the kernel; a delete changes
// the kernel, then removes the record. So the store always knows at least what
// the kernel holds. The engine ignores the errors of deletes and forgets what
// it asked to delete: such a thing is marked doomed in memory, wanted by
// nobody from then on, and finished by the next [Driver.Reconcile].
//
// Locking, in this order:
//
//  1. Driver.change: networks come and go one at a time, because elements that
//     two networks share (the hook, a bridge that exists already) may only go
//     with the last of them. Repair holds it too.
//  2. network.mu: calls about one endpoint hold it for reading, so that a
//     hundred of them wait for the kernel side by side (deleting a veth waits
//     17 ms for a grace period). Creating, deleting and repairing hold it for
//     writing. Repair takes all of them, in no particular order, which is safe
//     because it alone holds more than one, and holds change before.
//  3. endpoint.mu: one call about an endpoint at a time.
//  4. network.mending: one of the calls that find the network's parent replaced
//     makes what hangs on it again.
//  5. Driver.mu: the tables and all that is in the records; held for memory
//     only, never while the kernel or a store works. What it guards is written
//     with it and the lock above held, and so may be read with either.
//
// The periodic pass compares without any lock but the last; only when something
// differs, which may also be a request half done, it takes the others and
// looks again.
//
// No lock is held while the LAN is asked for an address ([Driver.Vet]) or told of
// one ([Driver.Announce]).
//
// Entry points: [New], [Driver.Recover], [Driver.Run], [Driver.Announce],
// [Driver.Sweep], [Driver.Register], [Driver.Reconcile], [Driver.Status], [Driver.Subnet],
// [Driver.Vet].
package driver
