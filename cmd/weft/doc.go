// Command weft is the plugin and the command that looks into it.
//
// It owns flags, environment, wiring, signals and the exit code, and decides
// nothing about networks. `weft serve` listens first and recovers while it
// listens: the engine dials for 9 s only, and calls can wait. Once it listens
// it does not exit on an error but answers every call with it, because the
// engine restarts a process that exits at once, and disables the plugin when
// that exits again.
//
// Locking: what the status shows of the start is behind one mutex.
//
// Entry points: main, [run].
package main
