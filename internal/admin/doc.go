// Package admin is the root-only socket beside the state, behind
// `weft status`: HTTP with JSON answers.
//
// It owns that socket's paths and both of its ends. It never changes
// anything, and does not know what is in a status.
//
// Locking: none; the status function is called for each request and may be
// called concurrently.
//
// Entry points: [Serve] in the plugin, [Get] in the command.
package admin
