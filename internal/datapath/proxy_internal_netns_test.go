package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
)

// A container of an internal network does not get by the proxy at what others
// publish; one of any other network does, and so does the internal one at what the
// host itself serves.
func TestProxyKeepsInternalNetworksOut(t *testing.T) {
	k, container := proxied(t, TCP)
	udp := socketsOf(UDP, 8080, "10.7.0.2:80", "::")
	one := socketsOf(TCP, 8081, "10.7.0.2:80", "fd07::1")
	more := socketsOf(TCP, 8991, "10.7.0.2:71", "::")
	more.Sockets[0].More = 9
	every := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	s := State{Elements: []Element{
		{Set: SetProxied, Net: every, Proto: TCP, Port: 8080},
		{Set: SetProxied, Net: every, Proto: UDP, Port: 8080},
		{Set: SetProxied, Net: prefix("fd07::1/128"), Proto: TCP, Port: 8081},
		{Set: SetProxied, Net: every, Proto: TCP, Port: 8991, More: 9},
	}}
	for _, x := range []State{udp, one, more} {
		s.Add(x)
	}
	within := map[string]*netnstest.NS{}
	for i, link := range []string{"wfin", "wfout"} {
		addr := fmt.Sprintf("fd%d::1/64", 20+i)
		s.Add(State{
			Bridges:  []Bridge{{Name: link, MAC: mac(byte(20 + i)), MTU: 1500, Addrs: []netip.Prefix{prefix(addr)}}},
			Veths:    []Veth{{Name: link + "v", Peer: link + "p", Master: link, MTU: 1500, PeerMAC: mac(byte(30 + i))}},
			Elements: []Element{{Set: SetBridges, Link: link}, {Set: SetPass, Link: link, Out: link}},
		})
	}
	s.Elements = append(s.Elements, Element{Set: SetInternal, Link: "wfin"})
	ensure(t, k, s)
	same(t, k, func() State {
		all := network()
		all.Elements, all.Sockets = nil, nil
		all.Add(socketsOf(TCP, 8080, "10.7.0.2:80", "::"))
		all.Add(s)
		return all
	}())
	for i, link := range []string{"wfin", "wfout"} {
		ns := netnstest.New(t)
		ns.Take(link+"p", "eth0", prefix(fmt.Sprintf("fd%d::2/64", 20+i)))
		ns.Exec("ip", "route", "add", "default", "via", fmt.Sprintf("fd%d::1", 20+i))
		within[link] = ns
	}

	serveTCP(t, container, func(c *net.TCPConn) { _, _ = io.WriteString(c, "served") })
	serveUDP(t, container)
	own, err := net.Listen("tcp6", "[::]:22")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Close() }()

	// What is nobody's published port stays as it was; and the way is there from now on.
	within["wfin"].Do(func() {
		c, err := net.DialTimeout("tcp", "[fd20::1]:22", patience)
		if err != nil {
			t.Fatalf("the host's own service: %v", err)
		}
		_ = c.Close()
	})
	for _, c := range []struct {
		network, to string
	}{
		{"tcp", "[fd07::1]:8080"}, {"tcp", "[HOST]:8080"}, {"tcp", "[fd07::1]:8081"},
		{"tcp", "[HOST]:9000"}, {"udp", "[HOST]:8080"},
	} {
		for i, link := range []string{"wfout", "wfin"} {
			to := c.to
			if to[1] == 'H' {
				to = fmt.Sprintf("[fd%d::1]%s", 21-i, to[6:])
			}
			limit := patience
			if link == "wfin" { // where nothing answers
				limit = 300 * time.Millisecond
			}
			got := reaches(within[link], c.network, to, limit)
			if link == "wfout" && got != nil {
				t.Errorf("%s %s is not reached from a network that is not internal: %v", c.network, to, got)
			}
			if link == "wfin" && !timedOut(got) {
				t.Errorf("%s %s from an internal network: %v, want silence", c.network, to, got)
			}
		}
	}
}

func timedOut(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// reaches asks a port and waits for an answer.
func reaches(ns *netnstest.NS, network, to string, limit time.Duration) (err error) {
	ns.Do(func() {
		var c net.Conn
		if c, err = net.DialTimeout(network, to, limit); err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(limit))
		if network == "udp" {
			if _, err = c.Write([]byte("asked")); err != nil {
				return
			}
		}
		_, err = c.Read(make([]byte, 16))
	})
	return err
}
