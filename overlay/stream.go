package overlay

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
)

// What streams may take of memory, in bytes. memberlist reads a stream whole
// before it knows from whom it is, and makes room for what its first bytes
// announce.
const (
	// mostHeld is for all streams together. What one holds is copied about twice
	// on its way.
	mostHeld = 2 * mostState
	// freely is what each stream may take without asking: what hosts usually say
	// to each other gets through while others take all the rest.
	freely = 64 << 10
	// mostStream is for one.
	mostStream = mostState + 1<<20
	// nodeSize is about what memberlist makes of a member that is announced.
	nodeSize = 256
)

// The first byte of what memberlist sends on a stream.
const (
	tagPing     = 0
	tagAck      = 2 // of a ping, on the stream that brought it
	tagPushPull = 6
	tagUser     = 8
	tagEncrypt  = 10
	tagError    = 13
	tagLabel    = 244
)

// stream is closed by the transport if by nobody else. One goroutine reads it.
type stream struct {
	net.Conn
	t      *transport
	closed func()

	in      *bufio.Reader
	checked error // of the first bytes
	begun   bool
	read    int // bytes
	held    int // of mostHeld; guarded by t.mu
}

// Read refuses what memberlist would make too much room for.
func (s *stream) Read(b []byte) (int, error) {
	if !s.begun {
		s.begun = true
		s.checked = s.check()
	}
	if s.checked != nil {
		return 0, s.checked
	}
	n, err := s.in.Read(b)
	if s.read += n; !s.t.hold(s, s.read) {
		s.checked = errTooMuch
		return 0, errTooMuch
	}
	return n, err
}

var errTooMuch = errors.New("too much on streams at once")

// check looks at the first bytes: where the rest is encrypted, it is read as it
// comes; where not, they say how much will come.
func (s *stream) check() error {
	p := &peeker{in: s.in}
	tag := p.next()
	if tag == tagLabel {
		for n := p.next(); n > 0 && p.err == nil; n-- {
			p.next()
		}
		tag = p.next()
	}
	if p.err != nil {
		return p.err
	}
	switch tag {
	case tagPing, tagAck, tagError:
		return nil
	case tagEncrypt:
		if n := p.number(4); p.err == nil && n > mostStream {
			return fmt.Errorf("stream of %d bytes is too long", n)
		}
		return p.err
	case tagUser, tagPushPull:
		return s.announced(p)
	}
	return fmt.Errorf("a stream does not begin with %d", tag)
}

// announced reads the header of what comes, which is MessagePack as memberlist
// writes it, and nothing else that could mean the same.
func (s *stream) announced(p *peeker) error {
	size := uint64(0)
	fields := p.next()
	if fields&0xf0 != 0x80 {
		return errors.New("the header of a stream is not one")
	}
	for range fields & 0x0f {
		switch name := p.text(); name {
		case "UserStateLen", "UserMsgLen":
			size += min(p.int(), mostHeld)
		case "Nodes":
			size += nodeSize * min(p.int(), mostHeld)
		case "Join":
			p.next()
		default:
			return errors.New("the header of a stream is not one")
		}
	}
	switch {
	case p.err != nil:
		return p.err
	case size > mostStream || !s.t.hold(s, int(size)):
		return fmt.Errorf("a stream that announces %d bytes: %w", size, errTooMuch)
	}
	return nil
}

// hold reserves what a stream needs, as long as it is open.
func (t *transport) hold(s *stream, size int) bool {
	if size <= freely {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	more := size - s.held
	if more <= 0 {
		return true
	}
	if t.held+more > mostHeld || size > mostStream || !t.open[s] {
		return false
	}
	t.held += more
	s.held += more
	return true
}

func (s *stream) Close() error {
	s.closed()
	return s.Conn.Close()
}

// peeker looks at bytes that stay to be read. After an error it gives zeros.
type peeker struct {
	in  *bufio.Reader
	at  int
	err error
}

func (p *peeker) next() byte { return byte(p.number(1)) }

func (p *peeker) number(size int) uint64 {
	b := p.bytes(size)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint64(slices.Concat(make([]byte, 8-size), b))
}

func (p *peeker) bytes(n int) []byte {
	if p.err != nil {
		return nil
	}
	b, err := p.in.Peek(p.at + n)
	if err != nil {
		p.err = err
		return nil
	}
	b = b[p.at:]
	p.at += n
	return b
}

// text is a short string of MessagePack.
func (p *peeker) text() string {
	tag := p.next()
	if tag&0xe0 != 0xa0 {
		return ""
	}
	return string(p.bytes(int(tag & 0x1f)))
}

// int is a number of MessagePack that is not negative; another is more than
// anybody may announce.
func (p *peeker) int() uint64 {
	switch tag := p.next(); {
	case tag < 0x80:
		return uint64(tag)
	case tag >= 0xcc && tag <= 0xcf: // unsigned
		return p.number(1 << (tag - 0xcc))
	case tag >= 0xd0 && tag <= 0xd3: // signed
		return p.number(1 << (tag - 0xd0))
	}
	return 1<<64 - 1
}
