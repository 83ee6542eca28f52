package netnstest

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func inode(t *testing.T) string {
	t.Helper()
	h, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close() }()
	return h.UniqueId()
}

func TestNamespacesAreSeparateAndLeft(t *testing.T) {
	outside := inode(t)
	var host, container string
	t.Run("in", func(t *testing.T) {
		Enter(t)
		host = inode(t)
		New(t).Do(func() { container = inode(t) })
		if now := inode(t); now != host {
			t.Errorf("after Do in %s, want %s", now, host)
		}
		t.Cleanup(func() {
			if now := inode(t); now != host {
				t.Errorf("cleanup in %s, want %s", now, host)
			}
		})
	})
	if host == outside || container == outside || host == container {
		t.Errorf("namespaces outside %s, host %s, container %s are not three", outside, host, container)
	}
	if now := inode(t); now != outside {
		t.Errorf("left in %s, want %s", now, outside)
	}
	if _, err := os.Stat("/run/netns/weft"); err == nil {
		t.Error("a namespace was given a name")
	}
}

func TestDoRestoresAfterGoexit(t *testing.T) {
	ns := New(t)
	outside := inode(t)
	t.Run("skipped inside", func(t *testing.T) {
		t.Cleanup(func() {
			if now := inode(t); now != outside {
				t.Errorf("thread left in %s, want %s", now, outside)
			}
		})
		ns.Do(func() { t.SkipNow() }) // Goexit, as t.Fatal does
	})
}

func TestTakeAndExec(t *testing.T) {
	Enter(t)
	container := New(t)
	v := netlink.NewVeth(netlink.NewLinkAttrs())
	v.Name, v.PeerName = "h0", "c0"
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	container.Take("c0", "eth0", netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("fd01::2/64"))
	container.Gateway(netip.MustParseAddr("10.1.0.1"))
	container.Do(func() {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		addrs, err := i.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		if got := addrs[0].String(); got != "10.1.0.2/24" {
			t.Errorf("first address %s", got)
		}
	})
	if out := container.Exec("cat", "/proc/self/net/route"); !strings.Contains(out, "0100010A") {
		t.Errorf("no default route via 10.1.0.1 in\n%s", out)
	}
}
