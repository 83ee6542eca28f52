package datapath

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watcher calls back when something arrives at one of its sockets, all from one
// goroutine: there may be ten thousand held ports, and hardly anything ever
// arrives at one of them, because what can be translated is. It has a goroutine
// only while it has a socket. A callback must not block: what it returns is how
// long it is not to be called again.
type watcher struct {
	mu   sync.Mutex
	loop *loop // nil without sockets
}

// loop is one run of a watcher.
type loop struct {
	epoll *os.File
	done  chan struct{}

	mu      sync.Mutex
	watched map[int32]*watched
}

type watched struct {
	mu   sync.Mutex // held during the callback
	gone bool
	call func() time.Duration
}

// add has call called while there is something to read. After unwatch returned
// it is not running and not called again; the socket is to be closed after.
func (w *watcher) add(c syscall.RawConn, call func() time.Duration) (unwatch func(), err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.loop == nil {
		if w.loop, err = newLoop(); err != nil {
			return nil, err
		}
	}
	l, x := w.loop, &watched{call: call}
	fd := int32(-1)
	cerr := c.Control(func(s uintptr) {
		fd = int32(s)
		l.mu.Lock()
		l.watched[fd] = x
		l.mu.Unlock()
		err = l.control(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN)
	})
	if err = errors.Join(cerr, err); err != nil {
		w.removeLocked(l, fd, x)
		return nil, fmt.Errorf("watch a socket: %w", err)
	}
	return func() {
		// The number is this socket's until it is closed.
		_ = c.Control(func(uintptr) { _ = l.control(unix.EPOLL_CTL_DEL, fd, 0) })
		w.mu.Lock()
		defer w.mu.Unlock()
		w.removeLocked(l, fd, x)
	}, nil
}

func (w *watcher) removeLocked(l *loop, fd int32, x *watched) {
	l.mu.Lock()
	if l.watched[fd] == x {
		delete(l.watched, fd)
	}
	last := len(l.watched) == 0
	l.mu.Unlock()
	x.mu.Lock() // waits for the callback
	x.gone = true
	x.mu.Unlock()
	if last && w.loop == l {
		w.loop = nil
		_ = l.epoll.Close()
		<-l.done
	}
}

func newLoop() (*loop, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // or os.File waits for it in a thread
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(fd))
	}
	l := &loop{epoll: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{}), watched: map[int32]*watched{}}
	raw, err := l.epoll.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, l.epoll.Close())
	}
	go l.run(raw)
	return l, nil
}

func (l *loop) control(op int, fd int32, events uint32) error {
	raw, err := l.epoll.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(ep uintptr) {
		err = unix.EpollCtl(int(ep), op, int(fd), &unix.EpollEvent{Events: events, Fd: fd})
	})
	return errors.Join(cerr, os.NewSyscallError("epoll_ctl", err))
}

// run ends when the epoll descriptor is closed.
func (l *loop) run(raw syscall.RawConn) {
	defer close(l.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := raw.Read(func(ep uintptr) bool {
			n, _ = unix.EpollWait(int(ep), events, 0)
			return n > 0
		})
		if err != nil {
			return
		}
		for _, e := range events[:n] {
			l.mu.Lock()
			x := l.watched[e.Fd]
			l.mu.Unlock()
			if x != nil {
				l.call(e.Fd, x)
			}
		}
	}
}

func (l *loop) call(fd int32, x *watched) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.gone {
		return
	}
	pause := x.call()
	if pause == 0 {
		return
	}
	// It stays in epoll, without events: to add it again could fail.
	_ = l.control(unix.EPOLL_CTL_MOD, fd, 0)
	time.AfterFunc(pause, func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		if !x.gone { // or the number may be another's
			_ = l.control(unix.EPOLL_CTL_MOD, fd, unix.EPOLLIN)
		}
	})
}
