package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

// message is what one host says to another in one go. Any field may be empty.
type message struct {
	From  string         // the sender's host ID
	At    netip.AddrPort // where it can be joined
	Query uint64         // when not 0: what does the receiver have of VNIs?
	// Hello says that VNIs are all networks of a sender that may have forgotten
	// what it knew of the receiver, or the receiver of it.
	Hello  bool
	VNIs   []uint32
	Answer uint64 // the Query that Parts answer
	Acks   []ack
	// Parts are the sender's own, which want an ack, and what it has of others.
	Parts []Known
	// Loud says that packets to the receiver seem to be lost: what answers this is
	// said by a stream too, and by Via.
	Loud bool
	// To is the host that this is for, where another one, Via, passes it on.
	To, Via string
}

// ack says which version of the receiver's part of a network its sender has.
type ack struct {
	VNI     uint32
	Version uint64
}

// wireVersion is the first byte of every message. It changes when a host of an older
// release would misread the rest; what is only added at the end it ignores.
const wireVersion = 1

// mostState bounds what is sent and decoded at once. A part is 25 kB at most.
const mostState = 16 << 20 // bytes

// guessed is the bit of Known.Silent that says so; an older release ignores it.
const guessed = 1 << 63

// errWire is returned for a message of another release.
var errWire = errors.New("message of another version")

// encode is binary rather than JSON: an endpoint takes 20 bytes instead of 80,
// so that the usual part fits into one packet.
func (m message) encode() []byte {
	b := append(make([]byte, 0, 256), wireVersion)
	b = appendText(b, m.From)
	b = binary.BigEndian.AppendUint16(appendAddr(b, m.At.Addr()), m.At.Port())
	b = binary.BigEndian.AppendUint64(b, m.Query)
	b = appendBool(b, m.Hello)
	b = binary.BigEndian.AppendUint16(b, uint16(len(m.VNIs)))
	for _, v := range m.VNIs {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	b = binary.BigEndian.AppendUint64(b, m.Answer)
	b = binary.BigEndian.AppendUint16(b, uint16(len(m.Acks)))
	for _, a := range m.Acks {
		b = binary.BigEndian.AppendUint32(b, a.VNI)
		b = binary.BigEndian.AppendUint64(b, a.Version)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(m.Parts)))
	for _, k := range m.Parts {
		silent := uint64(k.Silent) & (guessed - 1)
		if k.Guessed {
			silent |= guessed
		}
		b = binary.BigEndian.AppendUint64(b, silent)
		b = appendPart(b, k.Part)
	}
	return m.appendWay(m.appendRanges(b))
}

// tagRanges is the first byte of what follows the parts: their ranges, which older
// releases ignore. Then come the length in bytes (32 bits) and, for each part that has
// ranges, its index (32 bits), their number (8 bits) and the ranges. A message
// without any ends with its parts.
const tagRanges = 1

func (m message) appendRanges(b []byte) []byte {
	start := len(b)
	for i, k := range m.Parts {
		if len(k.Part.Ranges) == 0 {
			continue
		}
		if len(b) == start {
			b = append(b, tagRanges, 0, 0, 0, 0)
		}
		b = appendPrefixes(binary.BigEndian.AppendUint32(b, uint32(i)), k.Part.Ranges)
	}
	if len(b) > start {
		binary.BigEndian.PutUint32(b[start+1:], uint32(len(b)-start-5))
	}
	return b
}

// tagWay is the first byte of what follows the ranges: Loud, To and Via, where any is
// set, after their length in bytes (16 bits). Older releases ignore it.
const tagWay = 2

func (m message) appendWay(b []byte) []byte {
	if !m.Loud && m.To == "" && m.Via == "" {
		return b
	}
	way := appendText(appendText(appendBool(nil, m.Loud), m.To), m.Via)
	return append(binary.BigEndian.AppendUint16(append(b, tagWay), uint16(len(way))), way...)
}

// way reads what appendWay has written, if that comes next.
func (r *reader) way(m *message) {
	if r.short || len(r.rest) == 0 || r.rest[0] != tagWay {
		return
	}
	r.take(1)
	in := &reader{rest: r.take(int(r.uint16()))}
	m.Loud, m.To, m.Via = in.bool(), in.text(), in.text()
	r.short = r.short || in.short || m.To != "" && !isID(m.To) || m.Via != "" && !isID(m.Via)
}

// ranges reads what appendRanges has written, if that comes next.
func (r *reader) ranges(parts []Known) {
	if r.short || len(r.rest) == 0 || r.rest[0] != tagRanges {
		return
	}
	r.take(1)
	n := r.uint32()
	if r.short || uint64(n) > uint64(len(r.rest)) {
		r.short = true
		return
	}
	in := &reader{rest: r.take(int(n))}
	for len(in.rest) > 0 && !in.short {
		i, list := in.uint32(), in.prefixes()
		if in.short || uint64(i) >= uint64(len(parts)) {
			r.short = true
			return
		}
		if p := &parts[i].Part; !p.Gone {
			p.Ranges = list
		}
	}
	r.short = in.short
}

func appendPart(b []byte, p Part) []byte {
	b = appendText(b, p.Host)
	b = appendText(b, p.Name)
	b = binary.BigEndian.AppendUint32(b, p.VNI)
	b = binary.BigEndian.AppendUint64(b, p.Version)
	b = appendBool(b, p.Gone)
	if p.Gone {
		return b
	}
	b = appendAddr(b, p.VTEP)
	b = binary.BigEndian.AppendUint16(b, p.Port)
	b = binary.BigEndian.AppendUint16(b, uint16(p.MTU))
	b = appendPrefixes(b, p.Subnets)
	b = binary.BigEndian.AppendUint16(b, uint16(len(p.Endpoints)))
	for _, e := range p.Endpoints {
		b = append(b, e.MAC[:]...)
		b = binary.BigEndian.AppendUint64(b, e.Claim)
		b = append(b, byte(len(e.Addrs)))
		for _, a := range e.Addrs {
			b = appendAddr(b, a)
		}
	}
	return b
}

func appendPrefixes(b []byte, list []netip.Prefix) []byte {
	b = append(b, byte(len(list)))
	for _, p := range list {
		b = append(appendAddr(b, p.Addr()), byte(p.Bits()))
	}
	return b
}

func appendText(b []byte, s string) []byte {
	s = s[:min(len(s), 255)]
	return append(append(b, byte(len(s))), s...)
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	s := a.AsSlice()
	return append(append(b, byte(len(s))), s...)
}

// decode reads a message. What it takes in memory is bounded by the length of b,
// and nothing of it is shared with b. Parts are checked by [Table.Merge].
func decode(b []byte) (message, error) {
	switch {
	case len(b) == 0:
		return message{}, errors.New("empty message")
	case len(b) > mostState:
		return message{}, fmt.Errorf("message of %d bytes is too long", len(b))
	case b[0] != wireVersion:
		return message{}, fmt.Errorf("%w, %d", errWire, b[0])
	}
	r := &reader{rest: b[1:]}
	m := message{From: r.text(), At: netip.AddrPortFrom(r.addr(), r.uint16()), Query: r.uint64(), Hello: r.bool()}
	for n := r.uint16(); n > 0 && !r.short; n-- {
		m.VNIs = append(m.VNIs, r.uint32())
	}
	m.Answer = r.uint64()
	for n := r.uint16(); n > 0 && !r.short; n-- {
		m.Acks = append(m.Acks, ack{VNI: r.uint32(), Version: r.uint64()})
	}
	for n := r.uint32(); n > 0 && !r.short; n-- {
		silent := r.uint64()
		m.Parts = append(m.Parts, Known{Silent: time.Duration(silent & (guessed - 1)), Guessed: silent&guessed != 0, Part: r.part()})
	}
	r.ranges(m.Parts)
	r.way(&m)
	if r.short || !isID(m.From) {
		return message{}, errors.New("message is damaged")
	}
	return m, nil
}

// reader takes values off the front; short is set once there were too few bytes.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.rest) {
		r.short, r.rest = true, nil
		return make([]byte, n)
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) uint8() int     { return int(r.take(1)[0]) }
func (r *reader) bool() bool     { return r.uint8() != 0 }
func (r *reader) uint16() uint16 { return binary.BigEndian.Uint16(r.take(2)) }
func (r *reader) uint32() uint32 { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) uint64() uint64 { return binary.BigEndian.Uint64(r.take(8)) }
func (r *reader) text() string   { return string(r.take(r.uint8())) }

// addr is the zero Addr, which check refuses, for what is not one.
func (r *reader) addr() netip.Addr {
	a, _ := netip.AddrFromSlice(r.take(r.uint8()))
	return a
}

func (r *reader) prefixes() (list []netip.Prefix) {
	for n := r.uint8(); n > 0 && !r.short; n-- {
		list = append(list, netip.PrefixFrom(r.addr(), r.uint8()))
	}
	return list
}

func (r *reader) part() Part {
	p := Part{Host: r.text(), Name: r.text(), VNI: r.uint32(), Version: r.uint64(), Gone: r.bool()}
	if p.Gone {
		return p
	}
	p.VTEP, p.Port, p.MTU = r.addr(), r.uint16(), int(r.uint16())
	p.Subnets = r.prefixes()
	for n := r.uint16(); n > 0 && !r.short; n-- {
		e := Endpoint{MAC: datapath.MAC(r.take(6)), Claim: r.uint64()}
		for n := r.uint8(); n > 0 && !r.short; n-- {
			e.Addrs = append(e.Addrs, r.addr())
		}
		p.Endpoints = append(p.Endpoints, e)
	}
	return p
}
