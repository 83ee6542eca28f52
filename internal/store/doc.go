// Package store keeps records on disk.
//
// It owns the files: their layout, when they are synced, how damage is
// noticed, and who shares a commit. It never looks into a value and never
// decides what a record is for.
//
// A record is a key, a value and a revision. [Bolt.Put] with revision 0 creates
// and fails where the record exists; with any other revision it replaces exactly
// that revision. Revisions grow with every write to the file and are never
// used twice, so a record that was deleted and made again is not mistaken for
// the old one.
//
// Every write is on disk when the call returns (not so for [OpenBoot], whose
// file ends with the boot). Syncing the disk is nearly all that a write costs,
// so the calls that wait while one commit is being synced share the next one.
// Each of them succeeds or fails alone.
//
// Every call returns when its context ends, even if the disk hangs. A write
// that had already been handed over by then fails with [ErrUncertain]: it may
// still reach the disk. Writes are carried out in the order in which they were
// handed over, so a later write of the same caller is applied after it.
//
// Locking: one goroutine per open file does all the writing, started by Open and
// ended by Close; there is no other lock. All methods may be called from any
// goroutine. One process at a time may have a file open ([ErrBusy]).
//
// Entry points: [Open], [OpenBoot].
package store
