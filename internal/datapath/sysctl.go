package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// sysctl reads and writes settings below /proc/sys/net. They belong to the
// network namespace of the calling thread.
type sysctl struct {
	root string // what stands for /proc/sys
}

// The engine mounts /proc/sys read-only in a managed plugin, whatever the
// plugin's privileges, and allows no mount below /proc. So plugin.json mounts
// /proc/sys/net beside it.
const pluginSysctls = "/sysctl"

func newSysctl(mounted string) *sysctl {
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Join(mounted, "net"), &fs); err == nil && fs.Type == unix.PROC_SUPER_MAGIC {
		return &sysctl{root: mounted}
	}
	return &sysctl{root: "/proc/sys"}
}

// get reads a setting, for example "net/ipv4/ip_forward".
func (s *sysctl) get(name string) (string, error) {
	// Every endpoint reads one or two: os.ReadFile would introduce the file to
	// the poller first, which costs more than reading it.
	path := filepath.Join(s.root, name)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	defer func() { _ = unix.Close(fd) }()
	var buf [64]byte // the numbers that we read are shorter
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", &fs.PathError{Op: "read", Path: path, Err: err})
	}
	return strings.TrimSpace(string(buf[:n])), nil
}

// set writes a setting if it has another value, and says whether it had.
func (s *sysctl) set(name, value string) (changed bool, err error) {
	have, err := s.get(name)
	if err != nil || have == value {
		return false, err
	}
	switch err := s.write(name, value); {
	case errors.Is(err, unix.EROFS):
		return false, fmt.Errorf("set sysctl %s to %s: %s is read-only; mount /proc/sys/net of the host at %s/net", name, value, s.root, pluginSysctls)
	case err != nil:
		return false, fmt.Errorf("set sysctl %s to %s: %w", name, value, err)
	}
	return true, nil
}

func (s *sysctl) write(name, value string) error {
	f, err := os.OpenFile(filepath.Join(s.root, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// setting is one sysctl of a link. One of IPv6 that is not needed may be
// lacking: on a kernel without IPv6, or where the link's MTU is below 1280.
type setting struct {
	name, value string
	needed      bool
}

// bridge sets what a bridge of ours needs before it gets addresses.
func (s *sysctl) bridge(b Bridge, d *done) error {
	var want []setting
	has4, has6 := bothFamilies(b.Addrs)
	if has4 {
		// A published port is translated for 127.0.0.1 too; its packets
		// leave by the bridge with that source until they are masqueraded.
		want = append(want, setting{name: "ipv4/route_localnet", value: "1"})
	}
	if len(b.Addrs) == 0 {
		want = append(want, silent...)
	}
	return s.link("bridge", b.Name, append(want, quiet6(has6)...), d)
}

// silent is for bridges that the host does not speak on. IPv6 stays on there:
// without it the kernel refuses the neighbour entries from which the bridge
// answers for other hosts' containers. But it takes no link-local address
// (addr_gen_mode none), and does not answer for addresses that it has elsewhere.
var silent = []setting{
	{name: "ipv6/addr_gen_mode", value: "1"},
	{name: "ipv6/disable_ipv6", value: "0"}, // switched off by default on some hosts
	{name: "ipv4/arp_ignore", value: "8"},
}

// vxlan keeps the device from speaking itself: with a link-local address it
// would look for duplicates and for routers, out of the tunnel.
func (s *sysctl) vxlan(v VXLAN, d *done) error {
	return s.link(kindVXLAN, v.Name, []setting{{name: "ipv6/disable_ipv6", value: "1"}}, d)
}

// child sets what the host's own sub-interface needs. It hears the LAN's
// questions too, and must not answer for the host: it answers only for its own
// addresses (arp_ignore), and only to whom a route of ours leads (arp_filter).
func (s *sysctl) child(c Child, d *done) error {
	_, has6 := bothFamilies(c.Addrs)
	want := []setting{{name: "ipv4/arp_ignore", value: "1"}, {name: "ipv4/arp_filter", value: "1"}, {name: "ipv4/route_localnet", value: "1"}}
	if !has6 {
		want = append(want, setting{name: "ipv6/disable_ipv6", value: "1"})
	}
	return s.link(c.Kind, c.Name, append(want, quiet6(has6)...), d)
}

func bothFamilies(list []netip.Prefix) (has4, has6 bool) {
	for _, a := range list {
		has4 = has4 || a.Addr().Is4()
		has6 = has6 || a.Addr().Is6()
	}
	return has4, has6
}

// quiet6 is for links of ours that face containers.
func quiet6(used bool) []setting {
	var want []setting
	if used {
		// Hosts that switch IPv6 off by default refuse the addresses.
		want = append(want, setting{name: "ipv6/disable_ipv6", value: "0", needed: true})
		// The link-local address appears with the bridge's first port. While
		// the kernel looks for duplicates of it, up to two seconds, it resolves
		// no neighbour for packets that it forwards (ndisc_send_ns), and nobody
		// outside reaches the first container. Nothing else has the bridge's MAC.
		want = append(want, setting{name: "ipv6/accept_dad", value: "0", needed: true})
	}
	// A container must not become the host's router by advertising itself.
	return append(want, setting{name: "ipv6/accept_ra", value: "0"})
}

// link sets a link's settings, named as family/setting.
func (s *sysctl) link(kind, name string, want []setting, d *done) error {
	for _, w := range want {
		family, key, _ := strings.Cut(w.name, "/")
		changed, err := s.set(filepath.Join("net", family, "conf", name, key), w.value)
		if errors.Is(err, fs.ErrNotExist) && family == "ipv6" && !w.needed {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", kind, name, err)
		}
		if changed {
			d.say("%s %s: %s=%s", kind, name, key, w.value)
		}
	}
	return nil
}

const (
	forward4 = "net/ipv4/ip_forward"
	forward6 = "net/ipv6/conf/all/forwarding"
)

// on reports whether a switch is on. One that the kernel lacks, as it may
// IPv6, is off.
func (s *sysctl) on(name string) (bool, error) {
	v, err := s.get(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && v != "0", err
}

// strict reports whether reverse path filtering of a link is strict: the kernel
// goes by the higher one of the link's value and that of all.
func (s *sysctl) strict(link string) (bool, error) {
	high := "0"
	for _, name := range []string{"all", link} {
		v, err := s.get("net/ipv4/conf/" + name + "/rp_filter")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, err
		}
		high = max(high, v)
	}
	return high == "1", nil
}

// keepRouters lets interfaces that learn their routes from router
// advertisements go on learning while we forward: with accept_ra=1 the kernel
// stops and the host loses its IPv6 default route. Those that appear later, as a
// card that is plugged in, begin with the value of default; those of other
// namespaces do not. Our own links and the engine's bridges are set to 0.
func (s *sysctl) keepRouters(d *done) error {
	dir := "net/ipv6/conf"
	entries, err := os.ReadDir(filepath.Join(s.root, dir))
	if err != nil {
		return fmt.Errorf("list interfaces with IPv6: %w", err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "all", "lo":
			continue
		}
		name := filepath.Join(dir, e.Name(), "accept_ra")
		v, err := s.get(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the interface has gone
		}
		if err != nil {
			return err
		}
		if v != "1" {
			continue
		}
		if _, err := s.set(name, "2"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		d.say("%s: accept_ra=2, to keep its router while forwarding", e.Name())
	}
	return nil
}
