// Package plugin speaks the engine's plugin protocol: HTTP POSTs with JSON
// bodies over a unix socket.
//
// It owns the paths, the encoding, the limits (body size, time per call), the
// socket file, and the one log line per call. It never knows what a network
// or a pool is; the identifiers in a request are only copied into the log.
//
// Locking: one RWMutex over the table of handlers and the outcome of recovery,
// held for a look-up only.
// Every call runs in a goroutine of its own; handlers lock what they share.
//
// Entry points: [New], [Handle], [Mux.Constant], [Mux.Ready], [Listen],
// [Mux.Serve]; [ParsePortMap] and the types for what the wire structs of
// docker/go-plugins-helpers lack.
package plugin
