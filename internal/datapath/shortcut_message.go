package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// These messages are our own because google/nftables has no fwd expression, asks
// for no single element, and does not read which link a chain is hooked to.

// Type numbers by which nft(8) prints keys and data; the kernel keeps them.
const (
	nftEtherAddr = 9
	nftIfIndex   = 20
)

// Constants that golang.org/x/sys/unix lacks, from linux/netfilter/nf_tables.h.
const (
	nftaHookDevs   = 4
	nftaDeviceName = 1
)

// shortcutTag marks our rules, and is followed by the tunnel. It changes with
// what they say.
const shortcutTag = "weft shortcut 1 "

// nfBatch is what goes into one transaction.
type nfBatch struct {
	msgs []netlink.Message
	errs []error
}

// add appends a message about the netdev family.
func (b *nfBatch) add(kind int, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	fill(ae)
	data, err := ae.Encode()
	if err != nil {
		b.errs = append(b.errs, err)
	}
	b.msgs = append(b.msgs, nfMessage(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, unix.NFPROTO_NETDEV, 0, data))
}

func nfMessage(kind int, flags netlink.HeaderFlags, family byte, resource uint16, data []byte) netlink.Message {
	head := binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | flags}, Data: append(head, data...)}
}

func (b *nfBatch) table(table string, kind int) {
	var flags netlink.HeaderFlags
	if kind == unix.NFT_MSG_NEWTABLE {
		flags = netlink.Create
	}
	b.add(kind, flags, func(ae *netlink.AttributeEncoder) { ae.String(unix.NFTA_TABLE_NAME, table) })
}

// set makes a map that is not there.
func (b *nfBatch) set(table string, m shortcutMap) {
	b.add(unix.NFT_MSG_NEWSET, netlink.Create, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_TABLE, table)
		ae.String(unix.NFTA_SET_NAME, m.name())
		ae.Uint32(unix.NFTA_SET_ID, uint32(len(b.msgs)+1)) // any number that no other set of the transaction has
		ae.Uint32(unix.NFTA_SET_FLAGS, unix.NFT_SET_MAP)
		ae.Uint32(unix.NFTA_SET_KEY_TYPE, nftEtherAddr)
		ae.Uint32(unix.NFTA_SET_KEY_LEN, uint32(len(MAC{})))
		ae.Uint32(unix.NFTA_SET_DATA_TYPE, nftIfIndex)
		ae.Uint32(unix.NFTA_SET_DATA_LEN, 4)
		// 1 is the host's byte order, without which nft shows other numbers.
		ae.Bytes(unix.NFTA_SET_USERDATA, userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_DATABYTEORDER, 1))
	})
}

// chain makes one of a link's name, for what comes in by it.
func (b *nfBatch) chain(table, link string) {
	b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create|netlink.Excl, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, table)
		ae.String(unix.NFTA_CHAIN_NAME, link)
		ae.String(unix.NFTA_CHAIN_TYPE, "filter")
		ae.Nested(unix.NFTA_CHAIN_HOOK, func(ae *netlink.AttributeEncoder) error {
			ae.Uint32(unix.NFTA_HOOK_HOOKNUM, unix.NF_NETDEV_INGRESS)
			ae.Uint32(unix.NFTA_HOOK_PRIORITY, 0)
			ae.String(unix.NFTA_HOOK_DEV, link)
			return nil
		})
	})
}

// rule makes that of a chain: a frame whose destination is in the map goes
// straight to the link that the map names. Of frames that are not IP the kernel
// knows no protocol, so they do not match; ARP and ICMPv6, which is neighbour
// discovery too, are for the bridge, which answers some of it in the place of
// others. The type of the link is there for nft, which else shows no ether daddr.
func (b *nfBatch) rule(table, chain string, m shortcutMap) {
	exprs := slices.Concat(
		concat(l4proto),
		[]expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: firstRegister, Data: []byte{unix.IPPROTO_ICMPV6}}},
		is(meta(expr.MetaKeyIIFTYPE, 1), binary.NativeEndian.AppendUint16(nil, unix.ARPHRD_ETHER)),
		concat(payload(expr.PayloadBaseLLHeader, 0, uint32(len(MAC{})))),
		[]expr.Any{&expr.Lookup{SourceRegister: firstRegister, DestRegister: firstRegister, IsDestRegSet: true, SetName: m.name()}},
	)
	b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_RULE_TABLE, table)
		ae.String(unix.NFTA_RULE_CHAIN, chain)
		ae.Nested(unix.NFTA_RULE_EXPRESSIONS, func(ae *netlink.AttributeEncoder) error {
			for _, e := range exprs {
				raw, err := expr.Marshal(unix.NFPROTO_NETDEV, e)
				if err != nil {
					return err
				}
				ae.Bytes(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, raw)
			}
			ae.Nested(unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) error {
				ae.String(unix.NFTA_EXPR_NAME, "fwd")
				ae.Nested(unix.NFTA_EXPR_DATA, func(ae *netlink.AttributeEncoder) error {
					ae.Uint32(unix.NFTA_FWD_SREG_DEV, firstRegister)
					return nil
				})
				return nil
			})
			return nil
		})
		ae.Bytes(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, shortcutTag+m.tunnel))
	})
}

// element adds, deletes or asks for an entry; only to add it needs the number.
func (b *nfBatch) element(table string, kind int, m shortcutMap, mac MAC, number int) {
	value := func(data []byte) func(*netlink.AttributeEncoder) error {
		return func(ae *netlink.AttributeEncoder) error {
			ae.Bytes(unix.NFTA_DATA_VALUE, data)
			return nil
		}
	}
	var flags netlink.HeaderFlags
	if kind == unix.NFT_MSG_NEWSETELEM {
		flags = netlink.Create | netlink.Excl
	}
	b.add(kind, flags, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		ae.String(unix.NFTA_SET_ELEM_LIST_SET, m.name())
		ae.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) error {
				ae.Nested(unix.NFTA_SET_ELEM_KEY, value(mac[:]))
				if number != 0 {
					ae.Nested(unix.NFTA_SET_ELEM_DATA, value(binary.NativeEndian.AppendUint32(nil, uint32(number))))
				}
				return nil
			})
			return nil
		})
	})
}

// drop deletes a chain, with its rule, or a map. The attributes of all objects
// begin with the table and the name.
func (b *nfBatch) drop(table string, kind int, name string) { b.named(table, kind, 0, name) }

func (b *nfBatch) named(table string, kind int, flags netlink.HeaderFlags, name string) {
	b.add(kind, flags, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, table)
		switch {
		case name == "":
		case kind == unix.NFT_MSG_GETCHAIN || kind == unix.NFT_MSG_DELCHAIN:
			ae.String(unix.NFTA_CHAIN_NAME, name)
		default: // NFTA_SET_NAME and NFTA_RULE_CHAIN
			ae.String(unix.NFTA_SET_NAME, name)
		}
	})
}

// dialLocked opens the socket if it is not open.
func (s *shortcuts) dialLocked(until time.Time) error {
	if s.conn == nil {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: s.ns.fd()})
		if err != nil {
			return fmt.Errorf("open netfilter socket: %w", err)
		}
		s.conn = c
		if err := errors.Join(c.SetReadBuffer(nftBuffer), c.SetWriteBuffer(nftBuffer)); err != nil {
			return fmt.Errorf("open netfilter socket: %w", err)
		}
		// Without them an error is a number.
		_ = c.SetOption(netlink.ExtendedAcknowledge, true)
	}
	return s.conn.SetDeadline(until)
}

// hangUpLocked closes the socket: answers may still be under way.
func (s *shortcuts) hangUpLocked() {
	if s.conn != nil {
		_ = s.conn.Close() // nothing is lost with it
		s.conn = nil
	}
}

// commitLocked has the kernel carry out all of b or nothing. The kernel answers
// what it refuses, and the last message because it is asked to.
func (s *shortcuts) commitLocked(until time.Time, b nfBatch) (err error) {
	if len(b.msgs) == 0 || len(b.errs) > 0 {
		return errors.Join(b.errs...)
	}
	if err := s.dialLocked(until); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.hangUpLocked()
		}
	}()
	msgs := slices.Concat(
		[]netlink.Message{nfMessage(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)},
		b.msgs,
		[]netlink.Message{nfMessage(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)},
	)
	msgs[len(msgs)-2].Header.Flags |= netlink.Acknowledge
	if msgs, err = s.conn.SendMessages(msgs); err != nil {
		return err
	}
	for {
		answers, err := s.conn.Receive()
		if err != nil {
			return err
		}
		for _, a := range answers {
			if a.Header.Sequence == msgs[len(msgs)-2].Header.Sequence {
				return nil
			}
		}
	}
}

// askLocked sends the one request of b and returns the answer to it.
func (s *shortcuts) askLocked(until time.Time, b nfBatch) ([]netlink.Message, error) {
	if len(b.errs) > 0 {
		return nil, errors.Join(b.errs...)
	}
	for try := 1; ; try++ {
		if err := s.dialLocked(until); err != nil {
			return nil, err
		}
		msgs, err := s.conn.Execute(b.msgs[0])
		if err != nil {
			if !errors.Is(err, unix.ENOENT) { // which is an answer
				s.hangUpLocked()
			}
			return nil, err
		}
		torn := slices.ContainsFunc(msgs, func(m netlink.Message) bool { return m.Header.Flags&netlink.DumpInterrupted != 0 })
		if !torn || try == dumpTries {
			return msgs, nil
		}
	}
}

// getLocked asks for one object by its name.
func (s *shortcuts) getLocked(until time.Time, kind int, name string) (netlink.Message, error) {
	var b nfBatch
	b.named(s.table, kind, 0, name)
	msgs, err := s.askLocked(until, b)
	if err == nil && len(msgs) != 1 {
		err = fmt.Errorf("%d answers", len(msgs))
	}
	if err != nil {
		return netlink.Message{}, err
	}
	return msgs[0], nil
}

// dumpLocked asks for all objects of a kind in our table; of rules, for those of
// one chain if it is named. That nothing is there is an answer.
func (s *shortcuts) dumpLocked(until time.Time, kind int, name string) ([]netlink.Message, error) {
	var b nfBatch
	b.named(s.table, kind, netlink.Dump, name)
	msgs, err := s.askLocked(until, b)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return msgs, err
}

// nfChain is a chain of our table.
type nfChain struct {
	name, table, kind string
	links             []string // that it is hooked to
	hook, priority    uint32
	rules             []string // their comments
}

// right reports whether it is as we make it.
func (c nfChain) right() bool {
	return c.kind == "filter" && c.hook == unix.NF_NETDEV_INGRESS && c.priority == 0 &&
		slices.Equal(c.links, []string{c.name}) && len(c.rules) == 1 && strings.HasPrefix(c.rules[0], shortcutTag)
}

// tunnel is that of its rule, "" if it has none of ours.
func (c nfChain) tunnel() string {
	for _, r := range c.rules {
		if t, ok := strings.CutPrefix(r, shortcutTag); ok {
			return t
		}
	}
	return ""
}

// attributes goes through those of a message, after its header of 4 bytes.
func attributes(m netlink.Message, each func(*netlink.AttributeDecoder)) error {
	if len(m.Data) < 4 {
		return fmt.Errorf("netfilter answer of %d bytes", len(m.Data))
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		each(ad)
	}
	return ad.Err()
}

// nested goes through the attributes inside of one.
func nested(ad *netlink.AttributeDecoder, each func(*netlink.AttributeDecoder)) {
	ad.Nested(func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			each(ad)
		}
		return nil
	})
}

func parseNfChain(m netlink.Message) (c nfChain, err error) {
	err = attributes(m, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_CHAIN_TABLE:
			c.table = ad.String()
		case unix.NFTA_CHAIN_NAME:
			c.name = ad.String()
		case unix.NFTA_CHAIN_TYPE:
			c.kind = ad.String()
		case unix.NFTA_CHAIN_HOOK:
			nested(ad, func(ad *netlink.AttributeDecoder) {
				switch ad.Type() {
				case unix.NFTA_HOOK_HOOKNUM:
					c.hook = ad.Uint32()
				case unix.NFTA_HOOK_PRIORITY:
					c.priority = ad.Uint32()
				case nftaHookDevs:
					nested(ad, func(ad *netlink.AttributeDecoder) {
						if ad.Type() == nftaDeviceName {
							c.links = append(c.links, ad.String())
						}
					})
				}
			})
		}
	})
	return c, err
}

// chainsLocked lists those of our table; the kernel lists those of all.
func (s *shortcuts) chainsLocked(until time.Time) ([]nfChain, error) {
	msgs, err := s.dumpLocked(until, unix.NFT_MSG_GETCHAIN, "")
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	var list []nfChain
	for _, m := range msgs {
		c, err := parseNfChain(m)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		if c.table == s.table {
			list = append(list, c)
		}
	}
	return list, nil
}

// rulesLocked lists the comments of the rules of each chain, or of one.
func (s *shortcuts) rulesLocked(until time.Time, chain string) (map[string][]string, error) {
	msgs, err := s.dumpLocked(until, unix.NFT_MSG_GETRULE, chain)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	list := map[string][]string{}
	for _, m := range msgs {
		chain, comment := "", ""
		err := attributes(m, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case unix.NFTA_RULE_CHAIN:
				chain = ad.String()
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(ad.Bytes(), userdata.TypeComment)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		list[chain] = append(list[chain], comment)
	}
	return list, nil
}

// setsLocked lists the maps of our table.
func (s *shortcuts) setsLocked(until time.Time) (list []shortcutMap, err error) {
	msgs, err := s.dumpLocked(until, unix.NFT_MSG_GETSET, "")
	if err != nil {
		return nil, fmt.Errorf("list maps: %w", err)
	}
	for _, m := range msgs {
		err := attributes(m, func(ad *netlink.AttributeDecoder) {
			if ad.Type() != unix.NFTA_SET_NAME {
				return
			}
			for _, here := range []bool{true, false} {
				m := shortcutMap{here: here}
				if t, ok := strings.CutPrefix(ad.String(), m.name()); ok {
					m.tunnel = t
					list = append(list, m)
				}
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list maps: %w", err)
		}
	}
	return list, nil
}

// elementsLocked lists the entries of a map.
func (s *shortcuts) elementsLocked(until time.Time, m shortcutMap) (map[MAC]int, error) {
	msgs, err := s.dumpLocked(until, unix.NFT_MSG_GETSETELEM, m.name())
	if err != nil {
		return nil, fmt.Errorf("list entries of %s: %w", m.name(), err)
	}
	return parseNfElements(msgs)
}

func parseNfElements(msgs []netlink.Message) (map[MAC]int, error) {
	list := map[MAC]int{}
	for _, m := range msgs {
		err := attributes(m, func(ad *netlink.AttributeDecoder) {
			if ad.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			nested(ad, func(ad *netlink.AttributeDecoder) {
				var mac MAC
				number := 0
				nested(ad, func(ad *netlink.AttributeDecoder) {
					kind := ad.Type()
					if kind != unix.NFTA_SET_ELEM_KEY && kind != unix.NFTA_SET_ELEM_DATA {
						return
					}
					nested(ad, func(ad *netlink.AttributeDecoder) {
						switch b := bytes.Clone(ad.Bytes()); {
						case ad.Type() != unix.NFTA_DATA_VALUE:
						case kind == unix.NFTA_SET_ELEM_KEY:
							copy(mac[:], b)
						case len(b) == 4:
							number = int(binary.NativeEndian.Uint32(b))
						}
					})
				})
				list[mac] = number
			})
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}
