//go:build e2e

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// linkOf is the interface that has an address; a container may have several.
func linkOf(local string) (*net.Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, l := range all {
		addrs, err := l.Addrs()
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().String() == local {
				return &l, nil
			}
		}
	}
	return nil, fmt.Errorf("no interface has %s", local)
}

// hear joins groups on the interface with a local address and prints what every
// datagram to a port says, one a line, until stdin ends. The first line is
// "ready".
func hear(args []string, out io.Writer) error {
	if len(args) < 2 {
		return errors.New("usage: probe hear LOCAL PORT [GROUP ...]")
	}
	l, err := linkOf(args[0])
	if err != nil {
		return err
	}
	socks := map[string]*net.UDPConn{}
	for _, family := range []string{"udp4", "udp6"} {
		c, err := net.ListenPacket(family, ":"+args[1])
		if err != nil {
			return err
		}
		socks[family] = c.(*net.UDPConn)
	}
	for _, text := range args[2:] {
		g, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		if g.Is4() {
			m := &unix.IPMreqn{Multiaddr: g.As4(), Ifindex: int32(l.Index)}
			err = control(socks["udp4"], func(fd int) error { return unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, m) })
		} else {
			m := &unix.IPv6Mreq{Multiaddr: g.As16(), Interface: uint32(l.Index)}
			err = control(socks["udp6"], func(fd int) error { return unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, m) })
		}
		if err != nil {
			return fmt.Errorf("join %s on %s: %w", g, l.Name, err)
		}
	}
	var mu sync.Mutex // one line at a time
	for _, c := range socks {
		go func() {
			b := make([]byte, 2048)
			for {
				n, _, err := c.ReadFrom(b)
				if err != nil {
					return // the program ends
				}
				mu.Lock()
				_, _ = fmt.Fprintf(out, "%s\n", b[:n]) // a reader that went away has heard enough
				mu.Unlock()
			}
		}()
	}
	if _, err := io.WriteString(out, "ready\n"); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// control runs f with a socket's descriptor.
func control(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

// shout sends one datagram by the interface with a local address. This program's
// own container does not hear what it sends to a group.
func shout(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: probe shout LOCAL ADDRESS:PORT TEXT")
	}
	l, err := linkOf(args[0])
	if err != nil {
		return err
	}
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) {
			// The way to everybody, 255.255.255.255, and to groups would be the
			// default route.
			err = unix.BindToDevice(int(fd), l.Name)
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP, 0)
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP, 0) // one of the two families
		}), err)
	}}
	c, err := d.Dial("udp", args[1])
	if err != nil {
		return err
	}
	_, err = io.WriteString(c, args[2])
	return errors.Join(err, c.Close())
}

// ping sends one echo request that nobody may fragment and says who answered, or
// why nobody did. The size is that of the whole packet.
func ping(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("ping", flag.ContinueOnError)
	size := fs.Int("size", 64, "bytes, with the IP header")
	timeout := fs.Duration("timeout", time.Second, "for the answer")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("usage: probe ping [-size BYTES] [-timeout D] ADDRESS")
	}
	to, err := netip.ParseAddr(fs.Arg(0))
	if err != nil {
		return err
	}
	if err := echo(to, *size, *timeout); err != nil {
		return json.NewEncoder(out).Encode(answer{Err: word(err)})
	}
	return json.NewEncoder(out).Encode(answer{Src: to.String()})
}

// beat pings ten times a second until stdin ends. It prints when an answer came,
// in milliseconds since 1970, one a line.
func beat(args []string, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("usage: probe beat ADDRESS")
	}
	to, err := netip.ParseAddr(args[0])
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return nil
		case <-tick.C:
		}
		go func() {
			if echo(to, 64, time.Second) == nil {
				_, _ = fmt.Fprintln(out, time.Now().UnixMilli()) // one write, and nobody to tell of an error
			}
		}()
	}
}

// echo sends one echo request (RFC 792, RFC 4443) and waits for its answer.
func echo(to netip.Addr, size int, timeout time.Duration) error {
	network, header, request, reply := "ip4:icmp", 20, byte(8), byte(0)
	if to.Is6() {
		network, header, request, reply = "ip6:ipv6-icmp", 40, 128, 129
	}
	c, err := net.ListenIP(network, nil)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // nothing is lost with it
	err = control(c, func(fd int) error {
		if to.Is4() {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1)
	})
	if err != nil {
		return err
	}
	b := make([]byte, max(size-header, 16))
	b[0] = request
	binary.BigEndian.PutUint64(b[8:], rand.Uint64()) // tells its answer from others
	if to.Is4() {                                    // else the kernel does
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := c.WriteToIP(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	in := make([]byte, 1<<16)
	for {
		n, err := c.Read(in)
		if err != nil {
			return err
		}
		got := in[:n]
		if to.Is4() {
			got = got[min(n, header):]
		}
		if len(got) == len(b) && got[0] == reply && string(got[4:]) == string(b[4:]) {
			return nil
		}
	}
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// carry sends bytes of no pattern to a server of ours, which sends them back,
// and fails unless they are the same.
func carry(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: probe carry ADDRESS:PORT BYTES")
	}
	total, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // nothing is lost with it
	if _, err := io.WriteString(c, "back\n"); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, rand.NewChaCha8([32]byte{}), total)
		sent <- err
	}()
	want := io.LimitReader(rand.NewChaCha8([32]byte{}), total)
	a, b := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); at < total; {
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		n, err := c.Read(a)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
		if _, err := io.ReadFull(want, b[:n]); err != nil || string(a[:n]) != string(b[:n]) {
			return fmt.Errorf("other bytes came back between %d and %d", at, at+int64(n))
		}
		at += int64(n)
	}
	return <-sent
}
