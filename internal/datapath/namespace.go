package datapath

import (
	"fmt"
	"os"
)

// namespace is a network namespace in which sockets are opened later. All
// threads of the program are in one; those of tests are not.
type namespace struct {
	file *os.File
	info os.FileInfo
}

const threadNS = "/proc/thread-self/ns/net"

// threadNamespace is the calling thread's.
func threadNamespace() (*namespace, error) {
	f, err := os.Open(threadNS)
	if err != nil {
		return nil, fmt.Errorf("open this thread's network namespace: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close() // opened for reading only
		return nil, fmt.Errorf("read this thread's network namespace: %w", err)
	}
	return &namespace{file: f, info: info}, nil
}

// fd is what netlink libraries take. It is 0, the calling thread's, where that
// is the same: to enter a namespace takes CAP_SYS_ADMIN, even one's own.
func (n *namespace) fd() int {
	if info, err := os.Stat(threadNS); err == nil && os.SameFile(info, n.info) {
		return 0
	}
	return int(n.file.Fd())
}

func (n *namespace) close() { _ = n.file.Close() } // opened for reading only
