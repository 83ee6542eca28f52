// Package store keeps records: [Bolt] in a file, [Etcd] in a cluster that hosts
// share.
//
// It owns the files: their layout, when they are synced, how damage is
// noticed, and who shares a commit; and the connections to etcd. It never looks
// into a value and never decides what a record is for.
//
// A record is a key, a value and a revision. Put with revision 0 creates and
// fails where the record exists; with any other revision it replaces exactly
// that revision. Revisions grow with every write to the store and are never
// used twice, so a record that was deleted and made again is not mistaken for
// the old one. (A cluster that is made anew, or restored, begins anew.)
//
// Every call returns when its context ends. A write that had been handed over by
// then, or whose connection broke, fails with [ErrUncertain]: it may still come
// to pass. No write is repeated for the caller.
//
// # Bolt
//
// Every write is on disk when the call returns (not so for [OpenBoot], whose
// file ends with the boot). Syncing the disk is nearly all that a write costs,
// so the calls that wait while one commit is being synced share the next one.
// Each of them succeeds or fails alone.
//
// A call returns also when the disk hangs. Writes are carried out in the order
// in which they were handed over, so a later write of the same caller is applied
// after one that was uncertain. One process at a time may have a file open
// ([ErrBusy]).
//
// # Etcd
//
// Nothing waits for etcd to be there: opening does not, and calls give up after
// some seconds and say why. An uncertain write may be applied after a later one
// of the same caller, which may have gone to another member: it is to be
// repeated until it succeeds or the revision says no. [Etcd.Follow] tells what is
// in the store, and what changes; [Etcd.Alive] tells the others that this process
// is there. Both go on for ever.
//
// # Locks
//
// One goroutine per open file does all the writing, started by Open and ended by
// Close. Etcd has a mutex over the token of its login; the goroutines of its
// client end with Close. All methods may be called from any goroutine.
//
// Entry points: [Open], [OpenBoot], [OpenEtcd].
package store
