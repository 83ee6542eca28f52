package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// Sets that the firewall keeps for itself; nobody asks for them in a State.
const (
	setGuard   Set = "guard"   // Net (0.0.0.0/0 or ::/0, the family): not forwarded for others
	setLifted  Set = "lifted"  // Net (as in guard): forwarded for others all the same
	setUplinks Set = "uplinks" // Link: bridges that are the host's own way out
)

// field is one part of the key or the data of a set: which field of Element
// it holds, and in which form.
type field uint8

const (
	fieldLink   field = iota // Element.Link
	fieldOut                 // Element.Out
	fieldHost                // Element.Net, a single address
	fieldSubnet              // Element.Net, every address in it
	fieldFamily              // Element.Net, only its family
	fieldProto               // Element.Proto
	fieldPort                // Element.Port
	fieldPorts               // Element.Port and More, every port in it
	fieldTo                  // Element.To
	fieldToPort              // Element.ToPort
)

// setDef describes one set or map of the table. Sets that hold addresses
// exist twice, v6 tells the twins apart.
type setDef struct {
	id  uint32 // within one transaction
	set Set
	v6  bool
	any bool // the host address is "all of them" and not part of the key
	// ranged sets hold ranges of ports. They are apart from those of single
	// ports, in which adding an element costs the same whatever their number.
	ranged bool
	key    []field
	data   []field
}

// setDefs returns every set of the table.
func setDefs() []setDef {
	defs := []setDef{
		{set: SetBridges, key: []field{fieldLink}},
		{set: SetPass, key: []field{fieldLink, fieldOut}},
		{set: SetInternal, key: []field{fieldLink}},
		{set: SetOwn, key: []field{fieldLink}},
		{set: SetSwitched, key: []field{fieldLink}},
		{set: SetTunnels, key: []field{fieldPort}},
		{set: setUplinks, key: []field{fieldLink}},
		{set: setGuard, key: []field{fieldFamily}},
		{set: setLifted, key: []field{fieldFamily}},
	}
	for _, v6 := range []bool{false, true} {
		defs = append(defs,
			setDef{set: SetOpen, v6: v6, key: []field{fieldLink}},
			setDef{set: SetRouted, v6: v6, key: []field{fieldLink}},
			setDef{set: SetExposed, v6: v6, key: []field{fieldHost, fieldProto, fieldPort}},
			setDef{set: SetTrusted, v6: v6, key: []field{fieldLink, fieldHost, fieldProto, fieldPort}},
			setDef{set: SetMasquerade, v6: v6, key: []field{fieldSubnet}},
			setDef{set: SetSNAT, v6: v6, key: []field{fieldSubnet}, data: []field{fieldTo}},
			setDef{set: SetHairpin, v6: v6, key: []field{fieldSubnet, fieldLink}},
			setDef{set: SetBeside, v6: v6, key: []field{fieldSubnet, fieldTo}},
			setDef{set: SetHome, v6: v6, key: []field{fieldSubnet, fieldLink}},
			setDef{set: SetAttached, v6: v6, key: []field{fieldLink, fieldHost}},
			setDef{set: SetMembers, v6: v6, key: []field{fieldHost, fieldPort}},
			setDef{set: SetNear, v6: v6, key: []field{fieldHost, fieldTo}},
			setDef{set: SetPublished, v6: v6, key: []field{fieldHost, fieldProto, fieldPort}, data: []field{fieldTo, fieldToPort}},
			setDef{set: SetPublished, v6: v6, any: true, key: []field{fieldProto, fieldPort}, data: []field{fieldTo, fieldToPort}},
			setDef{set: SetExposed, v6: v6, ranged: true, key: []field{fieldSubnet, fieldProto, fieldPorts}},
			setDef{set: SetTrusted, v6: v6, ranged: true, key: []field{fieldSubnet, fieldProto, fieldPorts, fieldLink}},
			setDef{set: SetPublished, v6: v6, ranged: true, key: []field{fieldSubnet, fieldProto, fieldPorts}, data: []field{fieldTo}},
		)
	}
	// IPv4 is never served by the proxy alone.
	defs = append(defs,
		setDef{set: SetProxied, v6: true, key: []field{fieldHost, fieldProto, fieldPort}},
		setDef{set: SetProxied, v6: true, any: true, key: []field{fieldProto, fieldPort}},
		setDef{set: SetProxied, v6: true, ranged: true, key: []field{fieldSubnet, fieldProto, fieldPorts}},
	)
	for i := range defs {
		defs[i].id = uint32(i) + 1
	}
	return defs
}

// name is the set's name in the kernel.
func (d setDef) name() string {
	n := string(d.set)
	if d.any {
		n += "_any"
	}
	if d.ranged {
		n += "_range"
	}
	switch {
	case !d.perFamily():
		return n
	case d.v6:
		return n + "6"
	}
	return n + "4"
}

// perFamily reports whether the set has a twin of the other family.
func (d setDef) perFamily() bool {
	switch d.set {
	case SetBridges, SetPass, SetInternal, SetOwn, SetSwitched, SetTunnels, setUplinks, setGuard, setLifted:
		return false
	default:
		return true
	}
}

func (d setDef) interval() bool { return slices.Contains(d.key, fieldSubnet) }

// lookup is the key by which an Element finds its set.
type lookup struct {
	set             Set
	v6, any, ranged bool
}

func (d setDef) lookup() lookup { return lookup{d.set, d.v6, d.any, d.ranged} }

func lookupOf(e Element) lookup {
	l := lookup{set: e.Set, ranged: e.More > 0}
	switch {
	case e.Set == setGuard, e.Set == setLifted: // one set for both families
	case e.Net.IsValid():
		l.v6 = e.Net.Addr().Is6()
		l.any = (e.Set == SetPublished || e.Set == SetProxied) && e.Net.Bits() == 0 && e.More == 0
	}
	return l
}

// nft returns the set as google/nftables describes it.
func (d setDef) nft(t *nftables.Table) *nftables.Set {
	s := &nftables.Set{
		Table:    t,
		ID:       d.id,
		Name:     d.name(),
		KeyType:  d.datatype(d.key),
		IsMap:    len(d.data) > 0,
		Interval: d.interval(),
		// Of the sets of concatenations only those of intervals need to know
		// how wide each field is.
		Concatenation: d.interval() && len(d.key) > 1,
	}
	if t := d.fieldType(d.key[0]); len(d.key) == 1 && t == nftables.TypeIFName {
		s.KeyByteOrder = binaryutil.NativeEndian // or nft shows the names as empty
	}
	if s.IsMap {
		s.DataType = d.datatype(d.data)
	}
	return s
}

func (d setDef) datatype(fields []field) nftables.SetDatatype {
	types := make([]nftables.SetDatatype, len(fields))
	for i, f := range fields {
		types[i] = d.fieldType(f)
	}
	if len(types) == 1 {
		return types[0]
	}
	return nftables.MustConcatSetType(types...)
}

func (d setDef) fieldType(f field) nftables.SetDatatype {
	switch f {
	case fieldLink, fieldOut:
		return nftables.TypeIFName
	case fieldFamily:
		return nftables.TypeNFProto
	case fieldProto:
		return nftables.TypeInetProto
	case fieldPort, fieldPorts, fieldToPort:
		return nftables.TypeInetService
	case fieldHost, fieldSubnet, fieldTo:
	}
	if d.v6 {
		return nftables.TypeIP6Addr
	}
	return nftables.TypeIPAddr
}

// width is how many bytes the field takes. In a concatenation each field
// starts at a register, a multiple of four bytes.
func (d setDef) width(f field, of []field) int {
	n := int(d.fieldType(f).Bytes)
	if len(of) > 1 {
		n = (n + 3) &^ 3
	}
	return n
}

// encode returns what the kernel stores for e: one element, or two (start and
// end) in a set of plain intervals.
func (d setDef) encode(e Element) ([]nftables.SetElement, error) {
	if err := d.check(e); err != nil {
		return nil, fmt.Errorf("element %s %v: %w", e.Set, e, err)
	}
	first, last := e.Net.Addr(), e.Net.Addr()
	if d.interval() {
		last = netipx.PrefixLastIP(e.Net)
	}
	el := nftables.SetElement{Key: d.pack(d.key, e, first)}
	if len(d.data) > 0 {
		el.Val = d.pack(d.data, e, first)
	}
	if !d.interval() {
		return []nftables.SetElement{el}, nil
	}
	if len(d.key) > 1 {
		e.Port += e.More
		el.KeyEnd = d.pack(d.key, e, last)
		return []nftables.SetElement{el}, nil
	}
	after := last.Next()
	if !after.IsValid() { // the range reaches the end of the address space
		return []nftables.SetElement{el}, nil
	}
	return []nftables.SetElement{el, {Key: after.AsSlice(), IntervalEnd: true}}, nil
}

// check refuses what would not be read back as it was written, because
// comparing the two is how repair works.
func (d setDef) check(e Element) error {
	for _, l := range []string{e.Link, e.Out} {
		if len(l) >= unix.IFNAMSIZ || strings.ContainsRune(l, 0) {
			return fmt.Errorf("%q is not a link name", l)
		}
	}
	if d.interval() && (!e.Net.IsValid() || e.Net != e.Net.Masked()) {
		return fmt.Errorf("%s is not a subnet", e.Net)
	}
	if int(e.Port)+int(e.More) > math.MaxUint16 {
		return fmt.Errorf("%d ports from %d on are too many", int(e.More)+1, e.Port)
	}
	if (slices.Contains(d.data, fieldTo) || slices.Contains(d.key, fieldTo)) && (!e.To.IsValid() || e.To.Is6() != d.v6) {
		return fmt.Errorf("%s is not an address of the same family", e.To)
	}
	if e.Net.Addr().Is4In6() || e.To.Is4In6() || e.To.Zone() != "" {
		return errors.New("address in an ambiguous form")
	}
	back, err := d.unpack(d.pack(d.key, e, e.Net.Addr()), d.pack(d.data, e, e.Net.Addr()))
	if err != nil {
		return err
	}
	if d.interval() {
		back.Net = e.Net // only its first address went through
	}
	if d.ranged {
		back.More = e.More // nor did but its first port
	}
	if back != e {
		return errors.New("has fields that this set does not hold, or lacks some")
	}
	return nil
}

// pack writes the fields of e one after the other; addr stands for e.Net.
func (d setDef) pack(fields []field, e Element, addr netip.Addr) []byte {
	var b []byte
	for _, f := range fields {
		v := make([]byte, d.width(f, fields))
		switch f {
		case fieldLink:
			copy(v, e.Link)
		case fieldOut:
			copy(v, e.Out)
		case fieldHost, fieldSubnet:
			copy(v, addr.AsSlice())
		case fieldFamily:
			v[0] = unix.NFPROTO_IPV4
			if addr.Is6() {
				v[0] = unix.NFPROTO_IPV6
			}
		case fieldProto:
			v[0] = byte(e.Proto)
		case fieldPort, fieldPorts:
			binary.BigEndian.PutUint16(v, e.Port)
		case fieldTo:
			copy(v, e.To.AsSlice())
		case fieldToPort:
			binary.BigEndian.PutUint16(v, e.ToPort)
		}
		b = append(b, v...)
	}
	return b
}

// unpack is the reverse of pack. A subnet comes back as its first address.
func (d setDef) unpack(key, data []byte) (Element, error) {
	e := Element{Set: d.set}
	if d.any {
		e.Net = d.everything()
	}
	if d.perFamily() && !slices.Contains(d.key, fieldHost) && !d.interval() {
		e.Net = d.everything()
	}
	if err := d.unpackFields(&e, d.key, key); err != nil {
		return Element{}, err
	}
	if err := d.unpackFields(&e, d.data, data); err != nil {
		return Element{}, err
	}
	return e, nil
}

// everything is the prefix that stands for the whole family.
func (d setDef) everything() netip.Prefix {
	if d.v6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

func (d setDef) unpackFields(e *Element, fields []field, b []byte) error {
	for _, f := range fields {
		n := d.width(f, fields)
		if len(b) < n {
			return fmt.Errorf("element of %s is too short", d.name())
		}
		v := b[:n]
		b = b[n:]
		switch f {
		case fieldLink:
			e.Link, _, _ = strings.Cut(string(v), "\x00")
		case fieldOut:
			e.Out, _, _ = strings.Cut(string(v), "\x00")
		case fieldHost, fieldSubnet:
			a, _ := netip.AddrFromSlice(v)
			e.Net = netip.PrefixFrom(a, a.BitLen())
		case fieldFamily:
			e.Net = setDef{v6: v[0] == unix.NFPROTO_IPV6}.everything()
		case fieldProto:
			e.Proto = Proto(v[0])
		case fieldPort, fieldPorts:
			e.Port = binary.BigEndian.Uint16(v)
		case fieldTo:
			e.To, _ = netip.AddrFromSlice(v)
		case fieldToPort:
			e.ToPort = binary.BigEndian.Uint16(v)
		}
	}
	return nil
}

// decode turns a set's content, as the kernel lists it, into Elements. It
// leaves out what it cannot express and says so with ok false.
func (d setDef) decode(els []nftables.SetElement) (out []Element, ok bool) {
	ok = true
	if d.interval() && len(d.key) == 1 {
		els = joinIntervals(els)
	}
	for _, el := range els {
		e, err := d.unpack(el.Key, el.Val)
		if err == nil && d.interval() {
			e.Net, err = d.subnet(el)
		}
		if err == nil && d.ranged {
			e.More, err = d.more(el, e.Port)
		}
		if err != nil {
			ok = false
			continue
		}
		out = append(out, e)
	}
	return out, ok
}

// subnet reads the prefix that spans from Key to KeyEnd, both included.
func (d setDef) subnet(el nftables.SetElement) (netip.Prefix, error) {
	n := d.width(fieldSubnet, d.key)
	if len(el.Key) < n || len(el.KeyEnd) < n {
		return netip.Prefix{}, fmt.Errorf("element of %s is not an interval", d.name())
	}
	first, _ := netip.AddrFromSlice(el.Key[:n])
	last, _ := netip.AddrFromSlice(el.KeyEnd[:n])
	p, ok := netipx.IPRangeFrom(first, last).Prefix()
	if !ok {
		return netip.Prefix{}, fmt.Errorf("%s to %s is not a subnet", first, last)
	}
	return p, nil
}

// more reads how far the range of ports goes that begins with first.
func (d setDef) more(el nftables.SetElement, first uint16) (uint16, error) {
	end, err := d.unpack(el.KeyEnd, el.Val)
	if err != nil || end.Port <= first {
		return 0, fmt.Errorf("element of %s is not a range of ports", d.name())
	}
	return end.Port - first, nil
}

// joinIntervals gives each start its end: the kernel lists a plain interval
// as two elements, the second one (the first address outside) marked.
func joinIntervals(els []nftables.SetElement) []nftables.SetElement {
	els = slices.Clone(els)
	slices.SortFunc(els, func(a, b nftables.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		switch { // where one interval ends and the next begins, the end is first
		case a.IntervalEnd == b.IntervalEnd:
			return 0
		case a.IntervalEnd:
			return -1
		}
		return 1
	})
	var out []nftables.SetElement
	for i, el := range els {
		if el.IntervalEnd {
			continue
		}
		if i+1 < len(els) {
			end, _ := netip.AddrFromSlice(els[i+1].Key)
			el.KeyEnd = end.Prev().AsSlice()
		} else {
			el.KeyEnd = bytes.Repeat([]byte{0xff}, len(el.Key))
		}
		out = append(out, el)
	}
	return out
}
