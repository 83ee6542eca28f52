package netnstest

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is a network namespace that lives as long as its test.
type NS struct {
	tb testing.TB
	fd netns.NsHandle
}

// Run runs f in a new namespace, on the calling goroutine. What f registers
// with t.Cleanup runs in the namespace too.
func Run(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	Enter(t)
	f(t)
}

// Enter switches the calling goroutine into a new namespace until the test
// ends, after everything that it registers with Cleanup from now on.
func Enter(tb testing.TB) *NS {
	tb.Helper()
	ns := New(tb)
	leave := ns.enter()
	tb.Cleanup(leave)
	return ns
}

// New makes a namespace with its loopback interface up and stays outside. It
// does not forward IPv4, whatever the machine's own namespace does, of which the
// kernel has it inherit that.
func New(tb testing.TB) *NS {
	tb.Helper()
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		tb.Fatalf("open this thread's network namespace: %v", err)
	}
	defer func() { _ = old.Close() }()
	fd, err := netns.New()
	if err != nil {
		runtime.UnlockOSThread()
		missing(tb, err)
	}
	ns := &NS{tb: tb, fd: fd}
	tb.Cleanup(func() { _ = ns.fd.Close() })
	werr := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0)
	if err := netns.Set(old); err != nil {
		tb.Fatalf("leave the new network namespace: %v", err) // still locked: the thread ends with the goroutine
	}
	runtime.UnlockOSThread()
	if werr != nil {
		tb.Fatalf("switch forwarding off in the new network namespace: %v", werr)
	}
	h := ns.handle()
	defer h.Close()
	if err := h.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}); err != nil {
		tb.Fatalf("set lo up: %v", err)
	}
	return ns
}

// missing ends a test that may not make namespaces.
func missing(tb testing.TB, err error) {
	tb.Helper()
	if !errors.Is(err, unix.EPERM) || os.Getenv("REQUIRE_NETNS") == "1" {
		tb.Fatalf("make a network namespace: %v", err)
	}
	tb.Skipf("needs the privilege to make network namespaces (CAP_SYS_ADMIN): %v", err)
}

// Do runs f in the namespace, on the calling goroutine.
func (ns *NS) Do(f func()) {
	ns.tb.Helper()
	leave := ns.enter()
	defer leave()
	f()
}

// enter switches the thread and returns what switches it back.
func (ns *NS) enter() (leave func()) {
	ns.tb.Helper()
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		ns.tb.Fatalf("open this thread's network namespace: %v", err)
	}
	if err := netns.Set(ns.fd); err != nil {
		runtime.UnlockOSThread()
		_ = old.Close()
		ns.tb.Fatalf("enter network namespace: %v", err)
	}
	return func() {
		defer func() { _ = old.Close() }()
		if err := netns.Set(old); err != nil {
			ns.tb.Errorf("leave network namespace: %v", err)
			return // still locked: the thread ends with the goroutine
		}
		runtime.UnlockOSThread()
	}
}

// Fd is the namespace's file descriptor, for netlink calls that take one.
func (ns *NS) Fd() int { return int(ns.fd) }

// Exec runs a command in the namespace and returns what it printed; the test
// fails when the command does.
func (ns *NS) Exec(name string, arg ...string) string {
	ns.tb.Helper()
	out, err := ns.Output(name, arg...)
	if err != nil {
		ns.tb.Fatalf("%s %q: %v\n%s", name, arg, err, out)
	}
	return out
}

// Output is Exec for commands that may fail.
func (ns *NS) Output(name string, arg ...string) (string, error) {
	ns.tb.Helper()
	var out []byte
	var err error
	// A child process is forked from the calling thread and so starts in its
	// namespace.
	ns.Do(func() { out, err = exec.CommandContext(ns.tb.Context(), name, arg...).CombinedOutput() })
	return string(out), err
}

// Start starts a command in the namespace and kills it when the test ends.
func (ns *NS) Start(name string, arg ...string) *exec.Cmd {
	ns.tb.Helper()
	cmd := exec.Command(name, arg...)
	var err error
	ns.Do(func() { err = cmd.Start() })
	if err != nil {
		ns.tb.Fatalf("start %s: %v", name, err)
	}
	ns.tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// Take moves a link out of the calling goroutine's namespace into ns, renames
// it, gives it addresses and sets it up: what the engine does in Join.
func (ns *NS) Take(link, name string, addrs ...netip.Prefix) {
	ns.tb.Helper()
	here, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		ns.tb.Fatalf("open netlink: %v", err)
	}
	defer here.Close()
	l, err := here.LinkByName(link)
	if err != nil {
		ns.tb.Fatalf("take %s: %v", link, err)
	}
	if err := here.LinkSetNsFd(l, ns.Fd()); err != nil {
		ns.tb.Fatalf("move %s: %v", link, err)
	}
	there := ns.handle()
	defer there.Close()
	l, err = there.LinkByName(link)
	if err != nil {
		ns.tb.Fatalf("find moved %s: %v", link, err)
	}
	if err := there.LinkSetName(l, name); err != nil {
		ns.tb.Fatalf("rename %s to %s: %v", link, name, err)
	}
	for _, a := range addrs {
		if err := there.AddrAdd(l, address(a)); err != nil {
			ns.tb.Fatalf("add %s to %s: %v", a, name, err)
		}
	}
	if err := there.LinkSetUp(l); err != nil {
		ns.tb.Fatalf("set %s up: %v", name, err)
	}
}

// Return moves a link out of ns, back to the calling goroutine's namespace, down
// and under another name: what the engine does after Leave.
func (ns *NS) Return(link, name string) {
	ns.tb.Helper()
	here, err := netns.Get()
	if err != nil {
		ns.tb.Fatalf("find this namespace: %v", err)
	}
	defer func() { _ = here.Close() }()
	there := ns.handle()
	defer there.Close()
	l, err := there.LinkByName(link)
	if err != nil {
		ns.tb.Fatalf("return %s: %v", link, err)
	}
	if err := errors.Join(there.LinkSetDown(l), there.LinkSetName(l, name), there.LinkSetNsFd(l, int(here))); err != nil {
		ns.tb.Fatalf("return %s as %s: %v", link, name, err)
	}
}

// Gateway adds a default route through gw, whose interface is found by its
// address.
func (ns *NS) Gateway(gw netip.Addr) {
	ns.tb.Helper()
	h := ns.handle()
	defer h.Close()
	if err := h.RouteAdd(&netlink.Route{Gw: net.IP(gw.AsSlice())}); err != nil {
		ns.tb.Fatalf("add default route via %s: %v", gw, err)
	}
}

// handle opens netlink in the namespace; the caller closes it.
func (ns *NS) handle() *netlink.Handle {
	ns.tb.Helper()
	h, err := netlink.NewHandleAt(ns.fd, unix.NETLINK_ROUTE)
	if err != nil {
		ns.tb.Fatalf("open netlink: %v", err)
	}
	return h
}

// address is an address usable at once: duplicate detection would keep an
// IPv6 address back for a second.
func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{
		IP:   net.IP(p.Addr().AsSlice()),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// PrivateMounts runs f on a thread of its own, which is in the namespace ns and
// in a mount namespace that ends with f. f must not call t.Fatal.
func (ns *NS) PrivateMounts(f func() error) {
	ns.tb.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: a private mount namespace cannot be left
		err := netns.Set(ns.fd)
		if err == nil {
			err = unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS)
		}
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		ns.tb.Error(err)
	}
}
