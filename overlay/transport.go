package overlay

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// mostStreams is how many streams of others there may be at once, mostFromOne
	// how many from one address. A host opens one to each
	// other, one more to exchange everything, and one for each probe that no
	// packet answers.
	mostStreams = 128
	mostFromOne = 8
	// mostPacket is more than any release sends in one packet.
	mostPacket = 2 * packet
	// streamTime is how long one stream may take. It carries what fits into a
	// second on any network that carries containers' traffic.
	streamTime = 3 * time.Second
)

// transport is UDP and TCP on one address. memberlist's own would do but for
// this: it allocates 64 kB for each packet, takes any number of streams of 20 MB
// before it looks at the key, writes to a peer that hangs without a deadline,
// and leaves streams behind when it is shut down.
type transport struct {
	ctx     context.Context // ends what is being dialled
	cancel  context.CancelFunc
	addr    netip.AddrPort
	tcp     *net.TCPListener
	udp     *net.UDPConn
	packets chan *memberlist.Packet
	streams chan net.Conn
	free    chan struct{} // a token for each stream that may come
	wg      sync.WaitGroup

	mu   sync.Mutex
	open map[*stream]bool   // nil after Shutdown
	from map[netip.Addr]int // streams of others, by where they come from
	held int                // bytes, of mostHeld
}

// listen opens the sockets of an address.
func listen(ctx context.Context, addr netip.AddrPort) (memberlist.NodeAwareTransport, error) {
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		_ = tcp.Close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	// Parts of 200 hosts come at once after a partition. The kernel may grant
	// less, which costs a repetition.
	_ = udp.SetReadBuffer(1 << 20)
	ctx, cancel := context.WithCancel(ctx)
	t := &transport{
		ctx: ctx, cancel: cancel, addr: addr, tcp: tcp, udp: udp,
		packets: make(chan *memberlist.Packet), streams: make(chan net.Conn),
		free: make(chan struct{}, mostStreams), open: map[*stream]bool{}, from: map[netip.Addr]int{},
	}
	t.wg.Go(t.receive)
	t.wg.Go(t.accept)
	return t, nil
}

func (t *transport) receive() {
	buf := make([]byte, 1<<16)
	for t.ctx.Err() == nil {
		n, from, err := t.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.pause()
			continue
		}
		if n > mostPacket {
			continue
		}
		p := &memberlist.Packet{Buf: append([]byte(nil), buf[:n]...), From: net.UDPAddrFromAddrPort(from), Timestamp: time.Now()}
		select {
		case t.packets <- p:
		case <-t.ctx.Done():
		}
	}
}

func (t *transport) accept() {
	for t.ctx.Err() == nil {
		select {
		case t.free <- struct{}{}:
		case <-t.ctx.Done():
			return
		}
		conn, err := t.tcp.Accept()
		if err != nil {
			<-t.free
			t.pause()
			continue
		}
		source := sourceOf(conn)
		if !t.admit(source) {
			<-t.free
			_ = conn.Close()
			continue
		}
		if conn, err = t.track(conn, func() { t.dismiss(source); <-t.free }); err != nil {
			continue
		}
		select {
		case t.streams <- conn:
		case <-t.ctx.Done():
		}
	}
}

// pause keeps an error that stays, no file descriptors say, from taking a core.
func (t *transport) pause() {
	select {
	case <-time.After(10 * time.Millisecond):
	case <-t.ctx.Done():
	}
}

// track sees to it that a stream ends.
func (t *transport) track(conn net.Conn, closed func()) (net.Conn, error) {
	s := &stream{Conn: conn, t: t, in: bufio.NewReaderSize(conn, 1024)}
	s.closed = sync.OnceFunc(func() {
		t.mu.Lock()
		delete(t.open, s)
		t.held -= s.held
		s.held = 0
		t.mu.Unlock()
		closed()
	})
	t.mu.Lock()
	ended := t.open == nil
	if !ended {
		t.open[s] = true
	}
	t.mu.Unlock()
	err := net.ErrClosed
	if !ended {
		err = conn.SetDeadline(time.Now().Add(streamTime))
	}
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// sourceOf is the address that a stream comes from.
func sourceOf(conn net.Conn) netip.Addr {
	a, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	return a.Addr().Unmap()
}

func (t *transport) admit(source netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.from[source] >= mostFromOne {
		return false
	}
	t.from[source]++
	return true
}

func (t *transport) dismiss(source netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.from[source]--; t.from[source] <= 0 {
		delete(t.from, source)
	}
}

func (t *transport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	dialer := net.Dialer{Timeout: d, LocalAddr: &net.TCPAddr{IP: t.addr.Addr().AsSlice()}}
	conn, err := dialer.DialContext(t.ctx, "tcp", a.Addr)
	if err != nil {
		return nil, err
	}
	return t.track(conn, func() {})
}

func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	to, err := netip.ParseAddrPort(a.Addr)
	if err != nil {
		return time.Time{}, err
	}
	_, err = t.udp.WriteToUDPAddrPort(b, to)
	return time.Now(), err
}

func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.addr.Addr().AsSlice(), int(t.addr.Port()), nil
}

func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	return t.WriteToAddress(b, memberlist.Address{Addr: addr})
}

func (t *transport) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, d)
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

func (t *transport) Shutdown() error {
	t.cancel()
	_ = t.udp.Close()
	_ = t.tcp.Close()
	t.mu.Lock()
	open := t.open
	t.open = nil
	t.mu.Unlock()
	for s := range open {
		_ = s.Close()
	}
	t.wg.Wait()
	return nil
}
