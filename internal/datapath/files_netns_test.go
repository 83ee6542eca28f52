package datapath

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus/hooks/test"
)

// openFiles are those of this process.
func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestFilesAreSharedOut(t *testing.T) {
	f := newFiles()
	if kept := f.limit - f.mostHeld - f.mostPassed; kept < min(f.limit/4, 1024) {
		t.Errorf("of %d files %d are kept for the plugin's own", f.limit, kept)
	}
	if f.mostPassedOfOnePort > f.mostPassed/4 || f.mostPassedOfOnePort < tcpFiles {
		t.Errorf("one port may have %d of %d", f.mostPassedOfOnePort, f.mostPassed)
	}
}

// Whoever opens very many connections to a proxied port, or to all of them, gets
// a limited number of them; the rest is closed at once, said rarely, and what the
// plugin itself needs stays free.
func TestProxyLimitsConnections(t *testing.T) {
	const aPort, all, flood = 20, 30, 300
	k, container := proxied(t, TCP)
	log, records := test.NewNullLogger()
	k.sockets.proxy.log = log
	k.sockets.files.mostPassedOfOnePort, k.sockets.files.mostPassed = aPort*tcpFiles, all*tcpFiles
	ensure(t, k, socketsOf(TCP, 8081, "10.7.0.2:80", "::"))
	serveTCP(t, container, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("hello"))
		_, _ = io.ReadAll(c)
	})
	count := func(addr string) (served []*net.TCPConn) {
		for range flood {
			c, err := net.DialTimeout("tcp", addr, patience)
			if err == nil {
				_ = c.SetDeadline(time.Now().Add(patience))
				if _, err = io.ReadFull(c, make([]byte, 5)); err != nil {
					_ = c.Close()
				}
			}
			switch {
			case err == nil:
				served = append(served, c.(*net.TCPConn))
				t.Cleanup(func() { _ = c.Close() })
			case errors.Is(err, syscall.ECONNRESET):
			default:
				t.Fatalf("connection %d: %v", len(served), err)
			}
		}
		return served
	}
	before := openFiles(t)
	first := count("[::1]:8080")
	if len(first) != aPort {
		t.Errorf("one port serves %d connections, want %d", len(first), aPort)
	}
	// The test itself has both the client's and the container's sockets.
	if grown := openFiles(t) - before; grown > aPort*(tcpFiles+2) {
		t.Errorf("%d files for %d connections", grown, aPort)
	}
	second := count("[::1]:8081")
	if len(first)+len(second) != all {
		t.Errorf("two ports serve %d connections, want %d", len(first)+len(second), all)
	}
	reserve(t, k, PortRequest{Proto: UDP, Hosts: addrs("0.0.0.0", "::"), First: 53, Last: 53})
	var said []string
	for _, e := range records.AllEntries() {
		said = append(said, e.Message)
	}
	if len(said) != 1 || !strings.Contains(said[0], "too many connections") {
		t.Errorf("%d lines were logged: %q", len(said), said)
	}
	for _, c := range append(first, second...) {
		_ = c.Close()
	}
	for range 200 { // until the proxy has seen the ends
		if len(count("[::1]:8080")) > 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("no connection is served after the others ended")
}
