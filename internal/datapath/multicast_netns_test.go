package datapath

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
)

// TestLANMulticast: a LAN container and a program of the host that takes part in a
// group by the host's own sub-interface, as responders of mDNS do by every
// interface, hear each other; one that takes part by the card alone hears the
// LAN only.
func TestLANMulticast(t *testing.T) {
	k, host, station := lanWorld(t)
	ensure(t, k, lanNetwork())
	box := netnstest.New(t)
	box.Take("wfa", "eth0", prefix("192.0.2.5/24"), prefix("2001:db8:1::5/64"))
	box.Exec("sh", "-ec", "ip route add 169.254.7.7 dev eth0; ip route add 224.0.0.0/4 dev eth0")
	station.Exec("ip", "route", "add", "224.0.0.0/4", "dev", "eth0")
	for _, group := range []net.UDPAddr{{IP: net.IPv4(224, 0, 0, 251), Port: 5353}, {IP: net.ParseIP("ff02::fb"), Port: 5353}} {
		join := func(ns *netnstest.NS, link string) (c *net.UDPConn) {
			t.Helper()
			ns.Do(func() {
				ifi, err := net.InterfaceByName(link)
				if err != nil {
					t.Fatal(err)
				}
				if c, err = net.ListenMulticastUDP("udp", ifi, &group); err != nil {
					t.Fatal(err)
				}
			})
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		say := func(ns *netnstest.NS, link, word string) {
			t.Helper()
			ns.Do(func() {
				to := group
				if to.IP.To4() == nil {
					// By its number: the name's, which net remembers, is another namespace's.
					to.Zone, _, _ = strings.Cut(ns.Exec("ip", "-o", "link", "show", link), ":")
				}
				c, err := net.DialUDP("udp", nil, &to)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write([]byte(word)); err != nil {
					t.Fatal(err)
				}
				_ = c.Close()
			})
		}
		hears := func(c *net.UDPConn, wait time.Duration) string {
			b := make([]byte, 100)
			_ = c.SetReadDeadline(time.Now().Add(wait))
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return ""
			}
			return string(b[:n])
		}
		own, inside := join(host, "wfsnet"), join(box, "eth0")
		say(box, "eth0", "container")
		if got := hears(own, 5*time.Second); got != "container" {
			t.Errorf("%s: the host hears %q of the container", group.IP, got)
		}
		_ = hears(inside, time.Second) // itself
		host.Exec("ip", "route", "replace", "224.0.0.0/4", "dev", "wfsnet")
		say(host, "wfsnet", "host")
		if got := hears(inside, 5*time.Second); got != "host" {
			t.Errorf("%s: the container hears %q of the host", group.IP, got)
		}
	}
}
