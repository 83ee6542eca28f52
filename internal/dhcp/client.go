package dhcp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// errNotYet is wrapped by what may pass by itself within seconds: at boot, cards
// come up beside us.
var errNotYet = errors.New("the link is not usable yet")

// look is how often such a link is looked at.
const look = 50 * time.Millisecond

// Errors that callers tell apart. After ErrSilent the same question may be asked
// again later; after ErrRefused the address must no longer be counted on. Others
// are this host's own: a link that is not there or is down.
var (
	ErrSilent  = errors.New("no DHCP server answered")
	ErrRefused = errors.New("refused by DHCP server")
)

// ErrNoOffer is what the caller says of an offer that is none, see AcquireAfter.
var ErrNoOffer = errors.New("the DHCP server offers an address that it should know is taken")

// waits is how long each of the questions has for an answer. The engine gives
// a request 30 s, in which more than one address may be asked for; a server that
// pings an address before it offers it is silent for up to 3 s.
var waits = []time.Duration{1500 * time.Millisecond, 2500 * time.Millisecond, 4 * time.Second}

// busy is how many times the usual time there is, at most, for a server that
// answers others meanwhile. dnsmasq by default pings new addresses one after the
// other for 3 s each, up to 6 of them, and answers nobody while it does.
const busy = 3

// rounds is how often an offer that turned out to be none is asked for anew,
// after a pause of up to roundPause for each round before, 2 s in all: servers
// offer one address to many stations that ask at the same time, and the first of
// them has it.
const (
	rounds     = 40
	roundPause = 5 * time.Millisecond
)

// Station is whom a lease is for. Its IAID and the DUID are its identity for the
// server (RFC 4361): the same ones get the same address, with whatever MAC.
type Station struct {
	MAC  [6]byte
	IAID uint32 // of this station, among those of the host
	DUID []byte // of the host, see DUID
	Name string // host name for the server, made a DNS label; "" for none

	// ClientID is the identity for DHCPv4 servers in place of IAID and DUID, 2 to
	// 255 bytes; ByMAC has it be the MAC address (RFC 2132, 9.14).
	ClientID []byte `json:",omitempty"`
	ByMAC    bool   `json:",omitempty"`
	// Vendor is the vendor class (RFC 2132, 9.13), up to 255 bytes; DHCPv4 only.
	Vendor string `json:",omitempty"`
	// Register asks the server to enter the name into the DNS (RFC 4702, RFC 4704).
	Register bool `json:",omitempty"`
	// Patience is how long an answer is waited for in all; 0 for the usual time.
	Patience time.Duration `json:",omitempty"`
}

// DUID is that of a host with this UUID (RFC 6355).
func DUID(uuid [16]byte) []byte { return append([]byte{0, 4}, uuid[:]...) }

// check refuses what no message could carry (RFC 8415, 11.1).
func (s *Station) check() error {
	if s.MAC == [6]byte{} || s.MAC[0]&1 != 0 {
		return fmt.Errorf("%x is not the hardware address of a station", s.MAC)
	}
	if len(s.DUID) < 3 || len(s.DUID) > 130 {
		return fmt.Errorf("a DUID has 3 to 130 bytes, this one %d", len(s.DUID))
	}
	if n := len(s.ClientID); n == 1 || n > 255 || len(s.Vendor) > 255 {
		return fmt.Errorf("a client identifier has 2 to 255 bytes and a vendor class up to 255, these %d and %d", n, len(s.Vendor))
	}
	return nil
}

// label is the name as a DNS label: swarm has dots in names, Compose has
// underscores. "" if nothing remains.
func (s *Station) label() string {
	l := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '-'
	}, s.Name)
	l = strings.TrimLeft(l, "-")
	return strings.TrimRight(l[:min(len(l), 63)], "-")
}

// Client asks for leases. The zero value is ready for use, by any number of
// goroutines; a host has one.
type Client struct {
	waits []time.Duration // nil: as above; tests have less time

	mu     sync.Mutex
	served map[string]time.Time // when a station was last answered, by link
}

// Offer asks what a server would grant, and takes nothing: which subnet, router
// and options a LAN has. DHCPv6 (six) tells neither mask nor router: the address has
// 0 bits then. Errors are as with Acquire.
func (c *Client) Offer(ctx context.Context, link string, s Station, six bool) (Lease, error) {
	var within netip.Prefix
	if six {
		within = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	x, err := c.open(ctx, link, s, within, false)
	if err != nil {
		return Lease{}, err
	}
	defer x.close()
	return x.ask(discover, Lease{}, x.anyOffer(netip.Addr{}))
}

// Acquire leases an address on a link of this host, the one wanted unless that
// is the zero Addr, and only one within the prefix if that is valid. With an
// IPv6 prefix it is from DHCPv6, from the non-temporary ones (IA_NA).
//
// It returns within 8 s; within 24 s as long as a server answers other stations
// on that link, and within the station's patience where it has one. A link that is down or has no carrier has 8 s to change that, before. A server that offers another address than the one wanted has
// refused (ErrRefused); other answers that do not fit are ignored, and if no more
// come that is ErrSilent.
func (c *Client) Acquire(ctx context.Context, link string, s Station, want netip.Addr, within netip.Prefix) (Lease, error) {
	return c.AcquireAfter(ctx, link, s, want, within, func(Lease) error { return nil })
}

// AcquireAfter is Acquire, but before it asks for what a server offers it calls
// first with the offer, so that the caller can write down what it is about to have:
// the server takes an address for leased before its answer is here. An error of
// first ends the matter, and nothing is leased. first is called again with the
// next offer if a server refuses what it offered.
func (c *Client) AcquireAfter(ctx context.Context, link string, s Station, want netip.Addr, within netip.Prefix, first func(Lease) error) (Lease, error) {
	if want.IsValid() && !within.Contains(want) && (within.IsValid() || want.Is6()) {
		return Lease{}, fmt.Errorf("DHCP on %s: %s is wanted, which is outside %s", link, want, within)
	}
	x, err := c.open(ctx, link, s, within, true)
	if err != nil {
		return Lease{}, err
	}
	defer x.close()
	tried := map[netip.Addr]bool{}
	for round := 1; ; round++ {
		offer, err := x.ask(discover, Lease{Address: hostPrefix(want)}, x.anyOffer(want))
		if err != nil {
			return Lease{}, err
		}
		var l Lease
		if err = first(offer); err == nil {
			l, err = x.ask(request, offer, x.answerTo(offer, true))
		}
		a := offer.Address.Addr()
		switch {
		case !errors.Is(err, ErrRefused) && !errors.Is(err, ErrNoOffer), round == rounds:
			return l, err
		case tried[a] && errors.Is(err, ErrRefused):
			return l, fmt.Errorf("%w (it has offered %s twice, and refused it both times: see its log)", err, a)
		case tried[a], !x.rest(rand.N(time.Duration(round) * roundPause)):
			return l, err
		}
		tried[a] = true
	}
}

// rest waits, and reports whether there is time left.
func (x *exchange) rest(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-x.ctx.Done():
		return false
	}
}

// Extend asks for more time for a lease: at T1, again up to its end, and after a
// restart. Past T2 every server may answer, before only the one that granted it.
// The answer may differ in all but the address. After ErrRefused the lease is
// over; after other errors it holds until its end.
func (c *Client) Extend(ctx context.Context, link string, s Station, l Lease) (Lease, error) {
	x, err := c.reopen(ctx, link, s, l)
	if err != nil {
		return Lease{}, err
	}
	defer x.close()
	if time.Since(l.Granted) < l.Rebind {
		return x.ask(renew, l, x.answerTo(l, true))
	}
	return x.ask(rebind, l, x.answerTo(l, false))
}

// Release gives a lease back. Over IPv4 nobody confirms that; over IPv6
// ErrSilent says that no server did.
func (c *Client) Release(ctx context.Context, link string, s Station, l Lease) error {
	return c.giveUp(ctx, link, s, l, release)
}

// Decline tells the server that somebody else has the address of a lease, so
// that it will hand it to nobody for a while. What confirms it is as with
// Release.
func (c *Client) Decline(ctx context.Context, link string, s Station, l Lease) error {
	return c.giveUp(ctx, link, s, l, decline)
}

func (c *Client) giveUp(ctx context.Context, link string, s Station, l Lease, k kind) error {
	x, err := c.reopen(ctx, link, s, l)
	if err != nil {
		return err
	}
	defer x.close()
	if l.Address.Addr().Is4() {
		return x.send(k, l)
	}
	// A server that knows nothing of the lease says so; that will do.
	_, err = x.ask(k, l, func(a answer) (bool, error) { return a.verdict != offered, nil })
	return err
}

// exchange is one use of a link: the socket, what was asked, what came.
type exchange struct {
	client  *Client
	ctx     context.Context
	cancel  context.CancelFunc
	stop    func() bool // what would end a receive with the context
	link    string
	within  netip.Prefix
	waits   []time.Duration
	started time.Time
	end     time.Time // moved while the server is busy
	conn    *socket
	words   dialect
	ignored string // the last answer that did not fit, and why
}

// kind of question; each protocol has its own message for it.
type kind int

const (
	discover kind = iota
	request
	renew
	rebind
	release
	decline
)

// dialect is DHCPv4 or DHCPv6.
type dialect interface {
	// compose makes the message of a station for one question. Of the lease only
	// what the question is about counts; waited is for how long the station has
	// been asking.
	compose(k kind, about Lease, waited time.Duration) []byte
	// read is the meaning of an answer to this station; an error if it has none.
	// An address without a mask of its own gets that many bits.
	read(b []byte, bits int) (answer, error)
}

// answer is what a server said.
type answer struct {
	verdict verdict
	lease   Lease  // the server at least
	reason  string // of a refusal, in the server's words
}

type verdict int

const (
	offered verdict = iota
	granted
	refused
)

// open makes an exchange, in the calling thread's network namespace. patient: it
// waits for a link that is not usable yet.
func (c *Client) open(ctx context.Context, link string, s Station, within netip.Prefix, patient bool) (*exchange, error) {
	x := &exchange{client: c, link: link, within: within, waits: c.waits}
	if x.waits == nil {
		x.waits = waits
	}
	var all time.Duration
	for _, w := range x.waits {
		all += w
	}
	most := busy * all
	if s.Patience > 0 {
		all, most = s.Patience, s.Patience
	}
	err := s.check()
	if err == nil {
		s.DUID = slices.Clone(s.DUID)
		err = x.dial(ctx, s, all, patient)
	}
	if err != nil {
		return nil, fmt.Errorf("DHCP on %s: %w", link, err)
	}
	x.started = time.Now()
	x.end = x.started.Add(all)
	ctx, x.cancel = context.WithTimeout(ctx, most)
	x.ctx, x.stop = ctx, context.AfterFunc(ctx, x.conn.wake)
	return x, nil
}

// dial opens the socket, with time for the link to become usable.
func (x *exchange) dial(ctx context.Context, s Station, within time.Duration, patient bool) (err error) {
	for end := time.Now().Add(within); ; {
		x.words, x.conn, err = dial(x.link, s, x.within.Addr().Is6())
		if !patient || !errors.Is(err, errNotYet) || time.Now().After(end) {
			return err
		}
		select {
		case <-time.After(look):
		case <-ctx.Done():
			return err
		}
	}
}

// reopen makes an exchange about a lease.
func (c *Client) reopen(ctx context.Context, link string, s Station, l Lease) (*exchange, error) {
	if !l.Address.IsValid() || l.Address.Addr().Is4() != l.Server.IsValid() {
		return nil, fmt.Errorf("DHCP on %s: not a lease: an address and a server belong to it", link)
	}
	return c.open(ctx, link, s, l.Address, false)
}

func (x *exchange) close() {
	x.stop()
	x.cancel()
	x.conn.close()
}

// ask puts a question, up to three times and more often to a busy server, until
// take has an answer to it or all time is over. What take returns: whether the
// answer is the last word; if it is not, an error is the outcome unless a better
// answer comes before the question would be put again.
func (x *exchange) ask(k kind, about Lease, take func(answer) (bool, error)) (Lease, error) {
	first := time.Now().UTC() // an answer may be to any of the questions
	for i := 0; ; i++ {
		wait := x.waits[min(i, len(x.waits)-1)]
		asked := time.Now()
		if !asked.Before(x.end) {
			if !x.client.servedSince(x.link, asked.Add(-wait)) {
				return Lease{}, x.silence()
			}
			x.end = asked.Add(wait)
		}
		if err := x.conn.until(x.ctx, earlier(asked.Add(wait), x.end)); err != nil {
			return Lease{}, x.silence()
		}
		if err := x.send(k, about); err != nil {
			return Lease{}, err
		}
		var pending error
		for {
			a, err := x.hear()
			if errors.Is(err, errTime) {
				break
			}
			if err != nil {
				return Lease{}, fmt.Errorf("DHCP on %s: %w", x.link, err)
			}
			done, err := take(a)
			if done {
				a.lease.Granted = first
				x.client.serves(x.link)
				return a.lease, err
			}
			if pending == nil {
				pending = err
			}
		}
		if pending != nil {
			return Lease{}, pending
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func (c *Client) serves(link string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.served == nil {
		c.served = map[string]time.Time{}
	}
	c.served[link] = time.Now()
}

func (c *Client) servedSince(link string, t time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.served[link].After(t)
}

func (x *exchange) send(k kind, about Lease) error {
	if err := x.conn.send(x.words.compose(k, about, time.Since(x.started))); err != nil {
		return fmt.Errorf("DHCP on %s: %w", x.link, err)
	}
	return nil
}

// errElse is of a message that is no answer to this station.
var errElse = errors.New("not an answer to this station")

// hear waits for an answer that has a meaning.
func (x *exchange) hear() (answer, error) {
	for {
		b, err := x.conn.receive()
		if err != nil {
			return answer{}, err
		}
		a, err := x.words.read(b, x.within.Bits())
		if err == nil {
			return a, nil
		}
		if !errors.Is(err, errElse) {
			by := ""
			if a.lease.Server.IsValid() {
				by = " of server " + a.lease.Server.String()
			}
			x.ignored = fmt.Sprintf("an answer%s: %v", by, err)
		}
	}
}

// anyOffer takes the first offer that fits.
func (x *exchange) anyOffer(want netip.Addr) func(answer) (bool, error) {
	return func(a answer) (bool, error) {
		switch {
		case a.verdict == refused && a.lease.Server.IsValid(): // over IPv4 only a request is refused
			x.ignored = fmt.Sprintf("a refusal of server %s before anything was asked of it: %s", a.lease.Server, cmp.Or(a.reason, "without a reason"))
			return false, nil
		case a.verdict == refused:
			return false, x.refusal("an address", a.lease, a.reason)
		case a.verdict != offered || !x.fits(a.lease):
			return false, nil
		}
		if got := a.lease.Address.Addr(); want.IsValid() && got != want {
			return false, x.refusal(want.String(), a.lease, "it offers "+got.String()+" instead")
		}
		return true, nil
	}
}

// answerTo takes the answer to a request for this very lease; from another
// server only if it does not matter which one.
func (x *exchange) answerTo(l Lease, same bool) func(answer) (bool, error) {
	a0 := l.Address.Addr()
	return func(a answer) (bool, error) {
		own := a.lease.Server == l.Server && slices.Equal(a.lease.ServerDUID, l.ServerDUID)
		switch {
		case a.verdict == offered:
			return false, nil
		case same && !own:
			x.ignore(a.lease, "which "+l.server()+" is to answer for")
			return false, nil
		case a.verdict == refused:
			return own, x.refusal(a0.String(), a.lease, a.reason)
		case a.lease.Address.Addr() != a0:
			x.ignore(a.lease, "where "+a0.String()+" was asked for")
			return false, nil
		}
		return x.fits(a.lease), nil
	}
}

func (x *exchange) fits(l Lease) bool {
	why := l.unfit(x.within)
	if why != "" {
		x.ignore(l, why)
	}
	return why == ""
}

func (x *exchange) ignore(l Lease, why string) {
	what := "a refusal"
	if l.Address.IsValid() {
		what = l.Address.Addr().String()
	}
	x.ignored = fmt.Sprintf("%s from server %s, %s", what, l.server(), why)
}

func (x *exchange) refusal(what string, by Lease, reason string) error {
	if reason != "" {
		reason = ": " + reason
	}
	return fmt.Errorf("%s on %s is %w %s%s", what, x.link, ErrRefused, by.server(), reason)
}

// silence is the error of time that is over. A caller that has no more interest
// gets what it said itself.
func (x *exchange) silence() error {
	if errors.Is(x.ctx.Err(), context.Canceled) {
		return fmt.Errorf("DHCP on %s: %w", x.link, x.ctx.Err())
	}
	advice := "check that there is one on its LAN with addresses left, and that no firewall or switch keeps DHCP from this port"
	if x.ignored != "" {
		advice = "ignored " + x.ignored
	}
	return fmt.Errorf("%w on %s within %.2g s: %s", ErrSilent, x.link, time.Since(x.started).Seconds(), advice)
}

// hostPrefix is an address alone; the zero Prefix for the zero Addr.
func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
