package datapath

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// tcpFiles is what one proxied TCP connection has open: two sockets, and the
	// pipe that splice(2) needs for each direction.
	tcpFiles = 6
	// mostPassed bounds what all proxies have open however many files the process
	// may open: 4096 TCP connections.
	mostPassed = 4096 * tcpFiles
)

// files shares out the file descriptors that this process may have: one part
// for held ports, one for what the proxies pass on, and a rest for everything
// else, without which no call could be answered. Strangers decide how many
// connections there are, so they cannot be let into the other parts.
type files struct {
	limit int // of the process

	mu                  sync.Mutex
	held, mostHeld      int
	passed, mostPassed  int
	mostPassedOfOnePort int
}

// newFiles shares out the limit of the process, which Go has raised as far as it
// may at the start.
func newFiles() *files {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		r.Cur = 1024 // what a process has that nobody has thought of
	}
	limit := int(min(r.Cur, 1<<30))
	f := &files{limit: limit, mostPassed: min(limit/4, mostPassed)}
	f.mostPassedOfOnePort = f.mostPassed / 4
	f.mostHeld = limit - f.mostPassed - min(limit/4, 1024)
	return f
}

// room is an error if no n more ports can be held.
func (f *files) room(n int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n <= f.mostHeld-f.held {
		return nil
	}
	return fmt.Errorf("at most %d ports can be held, %d are, and %d more are asked for: publish fewer, or raise LimitNOFILE= of the engine and of containerd, which is %d",
		f.mostHeld, f.held, n, f.limit)
}

// hold counts ports that are held from now on, or, below 0, no longer.
func (f *files) hold(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held += n
}

// take lets a proxy open n files. ofPort is what the proxy of the port has open.
func (f *files) take(n int, ofPort *int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.passed+n > f.mostPassed || *ofPort+n > f.mostPassedOfOnePort {
		return false
	}
	f.passed += n
	*ofPort += n
	return true
}

// give is the reverse of take.
func (f *files) give(n int, ofPort *int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passed -= n
	*ofPort -= n
}
