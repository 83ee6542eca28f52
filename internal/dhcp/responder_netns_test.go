package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/internal/netnstest"
)

var theAddress = addr("10.77.0.50")

// newResponder is a server that says to each message what the test says.
func newResponder(t *testing.T, router *netnstest.NS, to string, say func(*dhcpv4.DHCPv4) [][]byte) {
	t.Helper()
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		e := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "eth0") })
		return errors.Join(e, err)
	}}
	var conn net.PacketConn
	var err error
	router.Do(func() { conn, err = cfg.ListenPacket(t.Context(), "udp4", "0.0.0.0:67") })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { _ = conn.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, _, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			m, err := dhcpv4.FromBytes(b[:n])
			if err != nil {
				t.Errorf("the client sends what cannot be read: %v", err)
				continue
			}
			for _, answer := range say(m) {
				_, _ = conn.WriteTo(answer, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr(to), clientPort4)))
			}
		}
	}()
}

// proper is the answer of a well-behaved server that has one address.
func proper(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	a, err := dhcpv4.NewReplyFromRequest(m,
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithYourIP(theAddress.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{10, 77, 0, 1})),
		dhcpv4.WithOption(dhcpv4.OptRouter(net.IP{10, 77, 0, 1})),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithLeaseTime(120))
	if err != nil {
		panic(err)
	}
	return a
}

func nak(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	a := proper(m)
	a.YourIPAddr = nil
	a.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeNak))
	a.UpdateOption(dhcpv4.OptMessage("not\nhere"))
	return a
}

// lies are answers that nobody may believe.
var lies = map[string]func(m *dhcpv4.DHCPv4) []byte{
	"transaction ID":    change(func(a *dhcpv4.DHCPv4) { a.TransactionID[3]++ }),
	"hardware address":  change(func(a *dhcpv4.DHCPv4) { a.ClientHWAddr = net.HardwareAddr{2, 0, 0, 0, 0, 9} }),
	"outside":           change(func(a *dhcpv4.DHCPv4) { a.YourIPAddr = net.IP{10, 66, 0, 5} }),
	"subnet's address":  change(func(a *dhcpv4.DHCPv4) { a.YourIPAddr = net.IP{10, 77, 0, 0} }),
	"broadcast address": change(func(a *dhcpv4.DHCPv4) { a.YourIPAddr = net.IP{10, 77, 0, 255} }),
	"its own address":   change(func(a *dhcpv4.DHCPv4) { a.YourIPAddr = net.IP{10, 77, 0, 1} }),
	"no address":        change(func(a *dhcpv4.DHCPv4) { a.YourIPAddr = nil }),
	"no server":         change(func(a *dhcpv4.DHCPv4) { a.DeleteOption(dhcpv4.OptionServerIdentifier) }),
	"no lease time":     change(func(a *dhcpv4.DHCPv4) { a.DeleteOption(dhcpv4.OptionIPAddressLeaseTime) }),
	"mask with a hole":  change(func(a *dhcpv4.DHCPv4) { a.UpdateOption(dhcpv4.OptSubnetMask(net.IPMask{255, 0, 255, 0})) }),
	"request":           change(func(a *dhcpv4.DHCPv4) { a.OpCode = dhcpv4.OpcodeBootRequest }),
	"wrong type": change(func(a *dhcpv4.DHCPv4) {
		if a.MessageType() == dhcpv4.MessageTypeOffer {
			a.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeAck))
		} else {
			a.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeOffer))
		}
	}),
	"NAK of another": func(m *dhcpv4.DHCPv4) []byte {
		a := nak(m)
		a.UpdateOption(dhcpv4.OptServerIdentifier(net.IP{10, 77, 0, 9}))
		return a.ToBytes()
	},
	"cut off": func(m *dhcpv4.DHCPv4) []byte { return proper(m).ToBytes()[:250] },
	"garbage": func(m *dhcpv4.DHCPv4) []byte {
		b := proper(m).ToBytes()
		for i := 236; i < len(b); i++ { // after the fixed part
			b[i] = byte(i * 7)
		}
		return b
	},
}

func change(f func(*dhcpv4.DHCPv4)) func(*dhcpv4.DHCPv4) []byte {
	return func(m *dhcpv4.DHCPv4) []byte {
		a := proper(m)
		f(a)
		return a.ToBytes()
	}
}

func TestLiesAreIgnored(t *testing.T) {
	t.Parallel()
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, router := newLAN(t)
			var honest atomic.Bool
			newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte {
				if honest.Load() {
					return [][]byte{lie(m), proper(m).ToBytes()}
				}
				return [][]byte{lie(m)}
			})
			l, err := hasty().Acquire(t.Context(), "lan0", station(1), netip.Addr{}, lan4)
			if !errors.Is(err, ErrSilent) {
				t.Errorf("nothing but lies: %v, %v", l, err)
			}
			honest.Store(true)
			l, err = hasty().Acquire(t.Context(), "lan0", station(1), netip.Addr{}, lan4)
			if err != nil || l.Address.Addr() != theAddress {
				t.Errorf("a lie, then the truth: %v, %v", l, err)
			}
			if l2, err := hasty().Extend(t.Context(), "lan0", station(1), l); err != nil || l2.Address != l.Address {
				t.Errorf("extended: a lie, then the truth: %v, %v", l, err)
			}
		})
	}
}

// A server may refuse what it has offered, because another station was faster; then
// it offers another address. One that refuses the same twice is not asked again.
func TestRefusedAfterOffer(t *testing.T) {
	for _, c := range []struct {
		times int32
		same  bool
		asked int32
		want  string
	}{
		{times: 1, same: true, asked: 2},
		{times: 100, same: true, asked: 2, want: "it has offered 10.77.0.50 twice, and refused it both times"},
		{times: 10, asked: 11},
		{times: 100, asked: rounds, want: "is refused by DHCP server 10.77.0.1"},
	} {
		t.Run(fmt.Sprintf("%d same=%t", c.times, c.same), func(t *testing.T) {
			_, router := newLAN(t)
			var naks atomic.Int32
			newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte {
				a := proper(m)
				if !c.same {
					a.YourIPAddr = net.IP{10, 77, 0, byte(50 + naks.Load())}
				}
				if m.MessageType() == dhcpv4.MessageTypeRequest && naks.Add(1) <= c.times {
					a = nak(m)
				}
				return [][]byte{a.ToBytes()}
			})
			patient := &Client{waits: []time.Duration{2 * time.Second, 2 * time.Second}} // nothing is silent here
			l, err := patient.Acquire(t.Context(), "lan0", station(1), netip.Addr{}, lan4)
			switch {
			case c.want == "" && (err != nil || !lan4.Contains(l.Address.Addr())):
				t.Errorf("%v, %v", l, err)
			case c.want != "" && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, %v; want %s", l, err, c.want)
			}
			if n := naks.Load(); n != c.asked {
				t.Errorf("asked %d times, want %d", n, c.asked)
			}
		})
	}
}

// TestNoOffer: an offer that the caller says is none is not requested, and the same
// one again ends the matter.
func TestNoOffer(t *testing.T) {
	_, router := newLAN(t)
	var offers, requests atomic.Int32
	var other atomic.Bool
	newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte {
		a := proper(m)
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			requests.Add(1)
		} else if offers.Add(1); other.Load() && offers.Load() > 1 {
			a.YourIPAddr = net.IP{10, 77, 0, 51}
		}
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			a.YourIPAddr = m.RequestedIPAddress()
		}
		return [][]byte{a.ToBytes()}
	})
	ours := func(offer Lease) error {
		if offer.Address.Addr() == theAddress {
			return fmt.Errorf("%s: %w", offer.Address, ErrNoOffer)
		}
		return nil
	}
	_, err := hasty().AcquireAfter(t.Context(), "lan0", station(1), netip.Addr{}, lan4, ours)
	if !errors.Is(err, ErrNoOffer) || offers.Load() != 2 || requests.Load() != 0 {
		t.Errorf("%v, %d offers, %d requests", err, offers.Load(), requests.Load())
	}
	offers.Store(0)
	other.Store(true)
	l, err := hasty().AcquireAfter(t.Context(), "lan0", station(1), netip.Addr{}, lan4, ours)
	if err != nil || l.Address.Addr() != addr("10.77.0.51") || requests.Load() != 1 {
		t.Errorf("%v, %v, %d requests", l, err, requests.Load())
	}
}

func TestRefusedExtension(t *testing.T) {
	_, router := newLAN(t)
	newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte { return [][]byte{nak(m).ToBytes()} })
	l := Lease{Address: prefix("10.77.0.50/24"), Server: addr("10.77.0.1"), Granted: time.Now(), Rebind: time.Hour, Valid: time.Hour}
	const want = "10.77.0.50 on lan0 is refused by DHCP server 10.77.0.1: nothere"
	if _, err := hasty().Extend(t.Context(), "lan0", station(1), l); !errors.Is(err, ErrRefused) || err.Error() != want {
		t.Errorf("got %v; want %s", err, want)
	}
	// Another server may say so only when everybody is asked.
	l.Server = addr("10.77.0.2")
	if _, err := hasty().Extend(t.Context(), "lan0", station(1), l); !errors.Is(err, ErrSilent) {
		t.Errorf("refused by another server before T2: %v", err)
	}
	l.Granted = l.Granted.Add(-l.Rebind)
	if _, err := hasty().Extend(t.Context(), "lan0", station(1), l); !errors.Is(err, ErrRefused) {
		t.Errorf("refused by another server past T2: %v", err)
	}
}

// Servers that do not know the broadcast flag answer the station itself. Its
// frames are not for the link, whether a container has them already or not.
func TestUnicastAnswers(t *testing.T) {
	for _, link := range []string{"lan0", "br0"} {
		t.Run(link, func(t *testing.T) {
			host, router := newLAN(t)
			if link == "br0" {
				host.Exec("ip", "link", "add", "br0", "type", "bridge")
				host.Exec("ip", "link", "set", "lan0", "master", "br0")
				host.Exec("ip", "link", "set", "br0", "up")
				awaitCarrier(t, "br0")
			}
			router.Exec("ip", "neigh", "replace", theAddress.String(), "lladdr", net.HardwareAddr(station1MAC[:]).String(), "dev", "eth0")
			newResponder(t, router, theAddress.String(), func(m *dhcpv4.DHCPv4) [][]byte { return [][]byte{proper(m).ToBytes()} })
			if l, err := hasty().Acquire(t.Context(), link, station(1), netip.Addr{}, lan4); err != nil || l.Address.Addr() != theAddress {
				t.Errorf("got %v, %v", l, err)
			}
		})
	}
}

var station1MAC = station(1).MAC

// A container on the link takes frames to its MAC, and copies of broadcast
// ones, for itself.
func TestExtendForLiveContainer(t *testing.T) {
	netnstest.Needs(t, "macvlan")
	for _, to := range []string{"255.255.255.255", theAddress.String()} {
		t.Run(to, func(t *testing.T) {
			host, router := newLAN(t)
			container := netnstest.New(t)
			host.Exec("ip", "link", "add", "mv0", "link", "lan0", "address", net.HardwareAddr(station1MAC[:]).String(), "type", "macvlan", "mode", "bridge")
			container.Take("mv0", "eth0", prefix("10.77.0.50/24"))
			newResponder(t, router, to, func(m *dhcpv4.DHCPv4) [][]byte { return [][]byte{proper(m).ToBytes()} })
			l := Lease{Address: prefix("10.77.0.50/24"), Server: addr("10.77.0.1"), Granted: time.Now(), Rebind: time.Hour, Valid: time.Hour}
			if l2, err := hasty().Extend(t.Context(), "lan0", station(1), l); err != nil || l2.Valid != 2*time.Minute {
				t.Errorf("got %v, %v", l2, err)
			}
		})
	}
}

// Nothing that a client sends leaves out who it is, and each question says
// what RFC 2131, table 5, wants of it.
func TestMessagesOnTheWire(t *testing.T) {
	_, router := newLAN(t)
	heard := make(chan *dhcpv4.DHCPv4, 16)
	newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte {
		heard <- m
		return [][]byte{proper(m).ToBytes()}
	})
	c, s := hasty(), station(7)
	s.Name = "web.1"
	l, err := c.Acquire(t.Context(), "lan0", s, theAddress, lan4)
	if err == nil {
		_, err = c.Extend(t.Context(), "lan0", s, l)
	}
	if err = errors.Join(err, c.Decline(t.Context(), "lan0", s, l), c.Release(t.Context(), "lan0", s, l)); err != nil {
		t.Fatal(err)
	}
	const asks = "broadcast=true name=web-1 list=true "
	for _, want := range []string{
		"DISCOVER " + asks + "wants=10.77.0.50 server=<nil> ciaddr=0.0.0.0",
		"REQUEST " + asks + "wants=10.77.0.50 server=10.77.0.1 ciaddr=0.0.0.0",
		"REQUEST " + asks + "wants=10.77.0.50 server=<nil> ciaddr=0.0.0.0",
		"DECLINE broadcast=false name= list=false wants=10.77.0.50 server=10.77.0.1 ciaddr=0.0.0.0",
		"RELEASE broadcast=false name= list=false wants=<nil> server=10.77.0.1 ciaddr=10.77.0.50",
	} {
		m := <-heard
		got := fmt.Sprintf("%s broadcast=%t name=%s list=%t wants=%s server=%s ciaddr=%s", m.MessageType(), m.IsBroadcast(), m.HostName(),
			slices.Contains(m.ParameterRequestList(), dhcpv4.OptionCode(dhcpv4.OptionClasslessStaticRoute)), m.RequestedIPAddress(), m.ServerIdentifier(), m.ClientIPAddr)
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if id := fmt.Sprintf("%x", m.Options.Get(dhcpv4.OptionClientIdentifier)); id != "ff00000007"+"0004"+strings.Repeat("00", 15)+"07" {
			t.Errorf("%s: client ID %s", m.MessageType(), id)
		}
		if m.ClientHWAddr.String() != net.HardwareAddr(s.MAC[:]).String() {
			t.Errorf("%s: from %s", m.MessageType(), m.ClientHWAddr)
		}
	}
}

func TestCallerLosesInterest(t *testing.T) {
	newLAN(t)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	start := time.Now()
	_, err := new(Client).Offer(ctx, "lan0", station(1), false)
	if d := time.Since(start); !errors.Is(err, context.Canceled) || d > time.Second {
		t.Errorf("after %s: %v", d, err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := new(Client).Offer(ctx, "lan0", station(1), false); !errors.Is(err, ErrSilent) {
		t.Errorf("at the caller's deadline: %v", err)
	}
}

// TestBusyWithinTheCall: a server that answers others, and never this station, is
// silent by the end of the caller's time, and that is what the caller is told.
func TestBusyWithinTheCall(t *testing.T) {
	_, router := newLAN(t)
	newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte {
		if m.ClientHWAddr.String() == net.HardwareAddr(station1MAC[:]).String() {
			return nil
		}
		return [][]byte{proper(m).ToBytes()}
	})
	c := hasty()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // hasty's are 0.7, 2.1 where others are served
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				c.serves("lan0")
			}
		}
	}()
	_, err := c.Acquire(ctx, "lan0", station(1), netip.Addr{}, lan4)
	if !errors.Is(err, ErrSilent) || ctx.Err() == nil {
		t.Errorf("%v; the caller's time is over: %v", err, ctx.Err())
	}
}

// TestUnusableAnswers: what is wrong with an answer is said, and not that there was none.
func TestUnusableAnswers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		say    func(*dhcpv4.DHCPv4) []byte
		within netip.Prefix
		want   string
	}{
		"no server": {change(func(a *dhcpv4.DHCPv4) { a.DeleteOption(dhcpv4.OptionServerIdentifier) }), lan4, "ignored an answer: it has no server identifier (option 54)"},
		"no lease time": {change(func(a *dhcpv4.DHCPv4) { a.DeleteOption(dhcpv4.OptionIPAddressLeaseTime) }), lan4,
			"ignored an answer of server 10.77.0.1: it has no lease time (option 51)"},
		"overload": {change(func(a *dhcpv4.DHCPv4) {
			a.DeleteOption(dhcpv4.OptionIPAddressLeaseTime)
			a.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionOptionOverload, []byte{1}))
		}), lan4, "(option 52) is not read"},
		"no mask": {change(func(a *dhcpv4.DHCPv4) { a.DeleteOption(dhcpv4.OptionSubnetMask) }), netip.Prefix{}, "it has no mask (option 1): give the subnet with --subnet"},
		"twice the mask": {change(func(a *dhcpv4.DHCPv4) {
			a.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionSubnetMask, []byte{255, 255, 255, 0, 255, 255, 255, 0}))
		}), lan4, ""},
		"mask with a hole": {change(func(a *dhcpv4.DHCPv4) { a.UpdateOption(dhcpv4.OptSubnetMask(net.IPMask{255, 0, 255, 0})) }), lan4, "its mask 255.0.255.0 (option 1) is none"},
		"refused":          {func(m *dhcpv4.DHCPv4) []byte { return nak(m).ToBytes() }, lan4, "a refusal of server 10.77.0.1 before anything was asked of it: nothere"},
		"no end":           {func(m *dhcpv4.DHCPv4) []byte { return bytes.TrimRight(proper(m).ToBytes(), "\x00\xff") }, lan4, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, router := newLAN(t)
			newResponder(t, router, "255.255.255.255", func(m *dhcpv4.DHCPv4) [][]byte { return [][]byte{c.say(m)} })
			l, err := hasty().Acquire(t.Context(), "lan0", station(1), netip.Addr{}, c.within)
			if c.want == "" && (err != nil || l.Address != prefix("10.77.0.50/24")) || c.want != "" && (!errors.Is(err, ErrSilent) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v; want %s", err, c.want)
			}
		})
	}
}
