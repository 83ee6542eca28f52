package datapath

import (
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
)

// noSocket has every accept fail, as it does without file descriptors.
type noSocket struct {
	syscall.RawConn
	tries *atomic.Int64
}

func (n noSocket) Control(f func(uintptr)) error {
	n.tries.Add(1)
	f(^uintptr(0))
	return nil
}

// A port whose accept fails waits, alone: the ports beside it are served meanwhile,
// and it is tried again.
func TestWatcherGoesOnBesideFailedAccept(t *testing.T) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	p := newProxy(log, newFiles())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var tries atomic.Int64
	failing := &tcpProxy{proxy: p, raw: noSocket{raw, &tries}, to: netip.MustParseAddrPort("10.1.0.2:80")}
	start := time.Now()
	unwatch, err := p.watcher.add(raw, failing.ready)
	if err != nil {
		t.Fatal(err)
	}
	waits, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = waits.Close() }()

	other, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	rawOther, err := other.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{}, 1)
	unwatchOther, err := p.watcher.add(rawOther, func() time.Duration {
		for buf := make([]byte, 8); readable(rawOther); {
			if _, err := other.Read(buf); err == nil {
				served <- struct{}{}
			}
		}
		return 0
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("udp", other.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	fast := 0
	for tries.Load() < 4 {
		sent := time.Now()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		select {
		case <-served:
		case <-time.After(10 * time.Second):
			t.Fatal("the port beside it is not served")
		}
		if time.Since(sent) < acceptPause/4 {
			fast++
		}
		if time.Since(start) > 30*time.Second {
			t.Fatal("the port is not tried again")
		}
	}
	if fast < 20 {
		t.Errorf("%d datagrams for the port beside it were served at once", fast)
	}
	if n, most := tries.Load(), int64(time.Since(start)/acceptPause)+1; n > most {
		t.Errorf("%d tries, want at most %d", n, most)
	}
	unwatch()
	after := tries.Load()
	time.Sleep(2 * acceptPause)
	if n := tries.Load(); n != after {
		t.Errorf("%d tries after its end", n-after)
	}
	unwatchOther()
	if p.watcher.loop != nil {
		t.Error("a loop without sockets")
	}
}

// The end of a pause and the end of its socket may come together.
func TestWatcherEndsInPause(t *testing.T) {
	var w watcher
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteTo([]byte("x"), c.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		var calls, ended atomic.Int64
		unwatch, err := w.add(raw, func() time.Duration {
			if ended.Load() > 0 {
				t.Error("called after its end")
			}
			calls.Add(1)
			return 100 * time.Microsecond
		})
		if err != nil {
			t.Fatal(err)
		}
		for calls.Load() < int64(1+i%3) {
			time.Sleep(10 * time.Microsecond)
		}
		unwatch()
		ended.Store(1)
	}
}
