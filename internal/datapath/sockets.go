package datapath

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// choices is how often the kernel is asked for a port that is free on every
// address of a request before giving up.
const choices = 32

// errTaken marks a port that somebody holds, the only reason to try the next.
var errTaken = errors.New("in use")

// hostPort is one port of one address of the host.
type hostPort struct {
	proto Proto
	addr  netip.AddrPort
}

func (p hostPort) String() string {
	return fmt.Sprintf("port %d/%s on %s", p.addr.Port(), p.proto, p.addr.Addr())
}

// held is a port that we hold.
type held struct {
	sock    io.Closer      // nil where the kernel has no such sockets
	to      netip.AddrPort // zero while it is only reserved
	service *service       // nil without a proxy
	twin    *held          // the other family's, if one socket holds both; see dualLocked
	dual    bool           // the socket holds both, and the other family is nobody's
}

func (h *held) close() error {
	if h.service != nil {
		h.service.quiet()
	}
	var err error
	if h.sock != nil {
		err = h.sock.Close()
	}
	if h.service != nil {
		h.service.end()
	}
	return err
}

// sockets holds published ports, so that no other program can take them, and
// runs the proxies behind them.
type sockets struct {
	log   logrus.FieldLogger
	proxy *proxy
	files *files

	mu     sync.Mutex
	held   map[hostPort]*held
	served map[Socket]bool // what ensure has adopted
	warned map[Proto]bool  // said once that its ports cannot be held
}

func newSockets(log logrus.FieldLogger) *sockets {
	f := newFiles()
	return &sockets{
		log:    log,
		proxy:  newProxy(log, f),
		files:  f,
		held:   make(map[hostPort]*held),
		served: make(map[Socket]bool),
		warned: make(map[Proto]bool),
	}
}

// close lets go of everything.
func (s *sockets) close() {
	s.mu.Lock()
	all := s.held
	s.held, s.served = make(map[hostPort]*held), make(map[Socket]bool)
	s.mu.Unlock()
	for _, h := range all {
		if h.twin == nil || h.sock != nil {
			s.files.hold(-1)
		}
		_ = h.close()
	}
}

// owned lists what Ensure has adopted.
func (s *sockets) owned() []Socket {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Keys(s.served), func(a, b Socket) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.Host.Compare(b.Host))
	})
}

// normal brings the host's address into one form, and checks what can overflow.
func (x Socket) normal() (Socket, error) {
	x.Host = netip.AddrPortFrom(x.Host.Addr().Unmap(), x.Host.Port())
	if !x.To.IsValid() {
		return x, fmt.Errorf("%s: no destination", x)
	}
	if max(int(x.Host.Port()), int(x.To.Port()))+int(x.More) > math.MaxUint16 {
		return x, fmt.Errorf("%s %s: %d ports from there on are too many", x.Proto, x.Host, int(x.More)+1)
	}
	return x, nil
}

// ports are the host's ports of x and where each leads.
func (x Socket) ports() iter.Seq2[hostPort, netip.AddrPort] {
	return func(yield func(hostPort, netip.AddrPort) bool) {
		for i := range uint32(x.More) + 1 {
			at := netip.AddrPortFrom(x.Host.Addr(), x.Host.Port()+uint16(i))
			if !yield(hostPort{x.Proto, at}, netip.AddrPortFrom(x.To.Addr(), x.To.Port()+uint16(i))) {
				return
			}
		}
	}
}

// ensure makes x held and served. made says that it was not before.
//
// both says that the same range is to be held on all addresses of both families.
func (s *sockets) ensure(ctx context.Context, x Socket, both bool) (made bool, err error) {
	if x, err = x.normal(); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.served[x] {
		return false, nil
	}
	var done []hostPort
	whole := context.WithoutCancel(ctx)
	for p, to := range x.ports() {
		if err = ctx.Err(); err == nil {
			err = s.serveLocked(whole, p, to, both)
		}
		if err != nil {
			return false, errors.Join(err, s.dropLocked(ctx, done...))
		}
		done = append(done, p)
	}
	s.served[x] = true
	return true, nil
}

// serveLocked holds one port, or adopts it where it is reserved, and serves it.
func (s *sockets) serveLocked(ctx context.Context, p hostPort, to netip.AddrPort, both bool) error {
	h := s.held[p]
	if h != nil && h.to.IsValid() {
		return errors.New(takenBy(p, h))
	}
	var err error
	if h == nil {
		if h, err = s.bindLocked(ctx, p, both); err != nil {
			return err
		}
	}
	h.to = to
	to4 := to
	if h.twin != nil && h.twin.to.IsValid() {
		to4 = h.twin.to
	}
	if h.service, err = s.proxy.start(ctx, h.sock, to, to4); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", p, err), s.dropLocked(ctx, p))
	}
	return nil
}

// release lets go of x. A port held for somebody else is not x: x is absent.
func (s *sockets) release(ctx context.Context, x Socket) error {
	x, err := x.normal()
	if err != nil {
		return nil //nolint:nilerr // nothing like it was ever held
	}
	var gone []*held
	s.mu.Lock()
	was := s.served[x]
	delete(s.served, x)
	for p, to := range x.ports() {
		if h := s.held[p]; h != nil && (!h.to.IsValid() || was && h.to == to) {
			delete(s.held, p)
			s.files.hold(-1)
			if h.twin != nil {
				err = errors.Join(err, s.partLocked(ctx, p, h))
				continue
			}
			gone = append(gone, h)
		}
	}
	s.mu.Unlock()
	for _, h := range gone {
		err = errors.Join(err, h.close())
	}
	if err != nil {
		return fmt.Errorf("let go of %s: %w", x, err)
	}
	return nil
}

func (s *sockets) dropLocked(ctx context.Context, ports ...hostPort) (err error) {
	for _, p := range ports {
		h := s.held[p]
		if h == nil {
			continue // went with its twin
		}
		delete(s.held, p)
		s.files.hold(-1)
		if h.twin != nil {
			err = errors.Join(err, s.partLocked(ctx, p, h))
			continue
		}
		err = errors.Join(err, h.close())
	}
	return err
}

// reserve is Kernel.Reserve.
func (s *sockets) reserve(ctx context.Context, r PortRequest) (uint16, error) {
	r, err := normal(r)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.First == 0 {
		return s.chooseLocked(ctx, r)
	}
	if r.More > 0 {
		return r.First, s.takeRangeLocked(ctx, r)
	}
	for port := uint32(r.First); port <= uint32(r.Last); port++ {
		if err := ctx.Err(); err != nil {
			return 0, fmt.Errorf("reserve %s port: %w", r.Proto, err)
		}
		_, err := s.takeLocked(ctx, r, uint16(port), false)
		if err == nil {
			return uint16(port), nil
		}
		if !errors.Is(err, errTaken) || r.First == r.Last {
			return 0, err
		}
	}
	return 0, fmt.Errorf("no port of %d-%d/%s is free on %s", r.First, r.Last, r.Proto, list(r.Hosts))
}

// normal checks a request and brings its addresses into one form.
func normal(r PortRequest) (PortRequest, error) {
	switch r.Proto {
	case TCP, UDP, SCTP:
	default:
		return r, fmt.Errorf("ports of %s cannot be published", r.Proto)
	}
	if len(r.Hosts) == 0 {
		return r, errors.New("reserve a port: no host address")
	}
	if r.Last == 0 {
		r.Last = r.First
	}
	if r.First > r.Last || r.First == 0 && r.Last != 0 {
		return r, fmt.Errorf("port range %d-%d is not one", r.First, r.Last)
	}
	if r.More > 0 && (r.First == 0 || r.First != r.Last || int(r.First)+int(r.More) > math.MaxUint16) {
		return r, fmt.Errorf("%d ports from %d-%d on cannot be reserved together", int(r.More)+1, r.First, r.Last)
	}
	hosts := make([]netip.Addr, 0, len(r.Hosts))
	for _, a := range r.Hosts {
		if !a.IsValid() {
			return r, errors.New("reserve a port: invalid host address")
		}
		if a = a.Unmap(); !slices.Contains(hosts, a) {
			hosts = append(hosts, a)
		}
	}
	r.Hosts = hosts
	return r, nil
}

// list names addresses for people.
func list(addrs []netip.Addr) string {
	var names []string
	for _, a := range addrs {
		names = append(names, a.String())
	}
	return strings.Join(names, ", ")
}

// chooseLocked lets the kernel choose a port for the first address and tries
// it on the others.
func (s *sockets) chooseLocked(ctx context.Context, r PortRequest) (uint16, error) {
	for range choices {
		if err := ctx.Err(); err != nil {
			return 0, fmt.Errorf("reserve %s port: %w", r.Proto, err)
		}
		port, err := s.probe(ctx, hostPort{r.Proto, netip.AddrPortFrom(r.Hosts[0], 0)})
		if err != nil {
			return 0, err
		}
		_, err = s.takeLocked(ctx, r, port, false)
		if err == nil {
			return port, nil
		}
		if !errors.Is(err, errTaken) {
			return 0, err
		}
	}
	return 0, fmt.Errorf("no %s port found that is free on all of %s", r.Proto, list(r.Hosts))
}

// takeRangeLocked holds all ports of a range on all addresses, or none.
func (s *sockets) takeRangeLocked(ctx context.Context, r PortRequest) error {
	both := slices.Contains(r.Hosts, netip.IPv4Unspecified()) && slices.Contains(r.Hosts, netip.IPv6Unspecified())
	n := len(r.Hosts)
	if both {
		n--
	}
	if err := s.files.room((int(r.More) + 1) * n); err != nil {
		return err
	}
	var bound []hostPort
	for i := range uint32(r.More) + 1 {
		err := ctx.Err()
		var some []hostPort
		if err == nil {
			some, err = s.takeLocked(ctx, r, r.First+uint16(i), both)
		}
		if err != nil {
			return errors.Join(err, s.dropLocked(ctx, bound...))
		}
		bound = append(bound, some...)
	}
	return nil
}

// takeLocked holds one port on all addresses, or on none. It returns what was not
// held before.
func (s *sockets) takeLocked(ctx context.Context, r PortRequest, port uint16, both bool) (bound []hostPort, err error) {
	for _, a := range r.Hosts {
		p := hostPort{r.Proto, netip.AddrPortFrom(a, port)}
		if h := s.held[p]; h != nil && !h.to.IsValid() && r.First == r.Last && r.First != 0 {
			continue // asked for again
		}
		if _, err := s.bindLocked(ctx, p, both); err != nil {
			return nil, errors.Join(err, s.dropLocked(ctx, bound...))
		}
		bound = append(bound, p)
	}
	return bound, nil
}

// bindLocked opens and remembers the socket of one port.
func (s *sockets) bindLocked(ctx context.Context, p hostPort, both bool) (*held, error) {
	if err := s.files.room(1); err != nil {
		return nil, err
	}
	if both {
		if h := s.dualLocked(ctx, p); h != nil {
			return h, nil
		}
	}
	sock, err := listen(ctx, p)
	if errors.Is(err, unix.EADDRINUSE) && s.narrowLocked(ctx, p) {
		sock, err = listen(ctx, p)
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.EADDRINUSE):
		if err := s.rivalLocked(p); err != nil {
			return nil, err
		}
		return nil, &takenError{fmt.Sprintf("%s is in use by another program", p)}
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s: this host has no such address", p)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		// Translation works without a socket; only the hold is missing.
		if err := s.rivalLocked(p); err != nil {
			return nil, err
		}
		s.warnLocked(p)
	default:
		return nil, fmt.Errorf("hold %s: %w", p, err)
	}
	h := &held{sock: sock}
	s.held[p] = h
	s.files.hold(1)
	return h, nil
}

// warnLocked says once per protocol what cannot be held here.
func (s *sockets) warnLocked(p hostPort) {
	if s.warned[p.proto] {
		return
	}
	s.warned[p.proto] = true
	s.log.WithField("port", p.String()).
		Warn("this kernel has no such sockets: published ports are not held against other programs")
}

// takenError says who has the port, and is errTaken.
type takenError struct{ text string }

func (e *takenError) Error() string        { return e.text }
func (e *takenError) Is(target error) bool { return target == errTaken }

// rivalLocked is an error if we hold the port ourselves, or hold it on an
// address that overlaps. The kernel says only that it is taken, not that we are
// who took it.
func (s *sockets) rivalLocked(p hostPort) error {
	if h := s.held[p]; h != nil {
		return &takenError{takenBy(p, h)}
	}
	wild := netip.IPv6Unspecified()
	if p.addr.Addr().Is4() {
		wild = netip.IPv4Unspecified()
	}
	if w := (hostPort{p.proto, netip.AddrPortFrom(wild, p.addr.Port())}); s.held[w] != nil {
		return &takenError{takenBy(p, s.held[w])}
	}
	if p.addr.Addr() != wild {
		return nil
	}
	for q, h := range s.held {
		if q.proto == p.proto && q.addr.Port() == p.addr.Port() && q.addr.Addr().Is4() == p.addr.Addr().Is4() {
			return &takenError{takenBy(p, h)}
		}
	}
	return nil
}

func takenBy(p hostPort, h *held) string {
	if h.to.IsValid() {
		return fmt.Sprintf("%s is already published for %s: stop that container, or choose another host port", p, h.to)
	}
	return fmt.Sprintf("%s is being published for another container", p)
}

// probe asks the kernel for a free port of the address.
func (s *sockets) probe(ctx context.Context, p hostPort) (uint16, error) {
	sock, err := listen(ctx, p)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
		p.proto = UDP // any free number will do where nobody can hold one
		p.addr = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		sock, err = listen(ctx, p)
	}
	if err != nil {
		return 0, fmt.Errorf("choose a %s port on %s: %w", p.proto, p.addr.Addr(), err)
	}
	defer func() { _ = sock.Close() }()
	switch sock := sock.(type) {
	case *net.TCPListener:
		return sock.Addr().(*net.TCPAddr).AddrPort().Port(), nil
	case *net.UDPConn:
		return sock.LocalAddr().(*net.UDPAddr).AddrPort().Port(), nil
	case *os.File:
		return boundPort(sock)
	}
	return 0, fmt.Errorf("choose a %s port: unexpected socket %T", p.proto, sock)
}
