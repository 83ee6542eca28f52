package datapath

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// tableName is the table of the default instance in the inet family, and begins
// those of others. Everything in ours is ours.
const tableName = "weft"

// acceptMark is the bit in a packet's mark by which our forward chain tells
// the rule in others' chains (see hook) that the packet is ours and allowed.
const acceptMark = 0x10000000

// Keys of the meta expression that golang.org/x/sys/unix lacks, from enum
// nft_meta_keys in linux/netfilter/nf_tables.h; Linux 5.6.
const (
	metaIIFKind expr.MetaKey = 26
	metaOIFKind expr.MetaKey = 27
)

// Bits of a connection's status, from linux/netfilter/nf_conntrack_common.h.
const ctStatusDNAT = 1 << 5

// firstRegister is NFT_REG32_00, the first of sixteen registers of 4 bytes.
const firstRegister = 8

// ruleset is the constant part of the table: everything but the elements.
type ruleset struct {
	table  *nftables.Table
	chains []*nftables.Chain
	rules  []rule
	sets   []setDef
	bySet  map[lookup]setDef
	// version changes with any change to the above.
	version string
}

// rule is one rule and the chain that it is in.
type rule struct {
	chain string
	exprs []expr.Any
}

// newRuleset builds the rules. They are data: the same in every process of
// this build, but for the name of the table.
func newRuleset(table string) (*ruleset, error) {
	t := &nftables.Table{Name: table, Family: nftables.TableFamilyINet}
	rs := &ruleset{table: t, chains: chains(t), sets: setDefs(), bySet: map[lookup]setDef{}}
	for _, d := range rs.sets {
		rs.bySet[d.lookup()] = d
	}
	rs.rules = slices.Concat(prerouting(), fromMembers(), forward(), toBridge(), fromBridge(), guard(), postrouting())

	if err := rs.fingerprint(); err != nil {
		return nil, err
	}
	return rs, nil
}

// fingerprint derives the version from everything that is constant.
func (rs *ruleset) fingerprint() error {
	var b bytes.Buffer
	for _, c := range rs.chains {
		b.WriteString(c.Name)
		if c.Hooknum != nil {
			fmt.Fprint(&b, c.Type, *c.Hooknum, *c.Priority, *c.Policy)
		}
	}
	for _, d := range rs.sets {
		fmt.Fprintf(&b, "%s %v %v", d.name(), d.key, d.data)
	}
	for _, r := range rs.rules {
		b.WriteString(r.chain)
		for _, e := range r.exprs {
			raw, err := expr.Marshal(byte(rs.table.Family), e)
			if err != nil {
				return fmt.Errorf("rule in %s: %w", r.chain, err)
			}
			b.Write(raw)
		}
	}
	h := fnv.New32a()
	_, _ = h.Write(b.Bytes()) // a hash never fails
	rs.version = fmt.Sprintf("%08x", h.Sum32())
	return nil
}

// tag is what marks rule number n as ours, and as of this version; nft shows
// it as the rule's comment.
func (rs *ruleset) tag(n int) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, fmt.Sprintf("weft %s %d", rs.version, n))
}

// chains returns every chain of the table. Our forward chain comes just
// before the one of iptables (priority filter), which reads our mark.
func chains(t *nftables.Table) []*nftables.Chain {
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority) *nftables.Chain {
		return &nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: &prio, Policy: &accept}
	}
	cs := []*nftables.Chain{
		base("raw_prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw),
		// After the raw chains of all instances, see fromMembers.
		base("strangers", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw+1),
		base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest),
		base("translated", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest+1),
		base("raw_output", nftables.ChainTypeFilter, nftables.ChainHookOutput, *nftables.ChainPriorityRaw),
		base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, *nftables.ChainPriorityNATDest),
		base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter),
		base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter-1),
		// After the forward chains of all instances, see guard.
		base("guard", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter),
		// Before those of others: see keepSource.
		base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource-1),
	}
	for _, name := range []string{"loopback", "tunnel", "stranger", "publish", "to_bridge", "from_bridge", "ok"} {
		cs = append(cs, &nftables.Chain{Name: name, Table: t})
	}
	return cs
}

var families = []bool{false, true} // is it IPv6?

// prerouting: what comes in, and what the host itself sends.
func prerouting() []rule {
	rs := []rule{
		// 127.0.0.0/8 is the host's own, whatever brings it: a published port is
		// translated before the kernel would refuse such a packet, and our bridges
		// have route_localnet on, so that 127.0.0.1:port leads into a container. For
		// ::1 the kernel itself sees to it, before any table.
		in("raw_prerouting", loopback(16), goTo("loopback")),
		in("raw_prerouting", loopback(12), goTo("loopback")),
		in("loopback", isLoopback(), verdict(expr.VerdictAccept)),
		// What a VRF says to itself comes by its device.
		in("loopback", isKind(metaIIFKind, "vrf"), verdict(expr.VerdictAccept)),
		in("loopback", drop()),
		// What goes there now is the answer to 127.0.0.1:port, translated back before
		// it enters its bridge, as with br_netfilter: the filter there lets it in.
		in("translated", loopback(16), isBridge(metaIIFKind), allow()),
		// What is only switched from port to port is no connection of the host's:
		// with br_netfilter each frame between two containers of a cluster would
		// be tracked on both hosts, inside and outside of the tunnel.
		in("raw_prerouting", isIn("switched", iif), untracked(), verdict(expr.VerdictAccept)),
		in("raw_prerouting", isByte(l4proto, unix.IPPROTO_UDP), isIn("tunnels", dport), goTo("tunnel")),
		// The host does not speak on a bridge that only switches, and whoever is on
		// it has no business with the host.
		in("input", isIn("switched", iif), drop()),
		// By a link-local address of the host an internal network would get at
		// ports that others publish, through the proxy.
		in("input", isIn("internal", iif), isByte(l4proto, unix.IPPROTO_TCP), isV6LinkLocal(), drop()),
		in("input", isIn("internal", iif), isByte(l4proto, unix.IPPROTO_UDP), isV6LinkLocal(), drop()),
		// And by any other address, at those that nothing translates.
		in("input", isIn("internal", iif), family(true), isIn("proxied_any6", l4proto, dport), drop()),
		in("input", isIn("internal", iif), family(true), isIn("proxied6", daddr(true), l4proto, dport), drop()),
		in("input", isIn("internal", iif), family(true), isIn("proxied_range6", daddr(true), l4proto, dport), drop()),
	}
	rs = append(rs,
		// A bridge that does not pass to itself has isolated ports (ICC off).
		// With br_netfilter a translated packet for the same bridge would go
		// from one isolated port straight to another and be dropped there; the
		// proxy behind the held port takes it instead.
		in("prerouting", isIn("bridges", iif), isNotIn("internal", iif), isNotIn("pass", iif, iif), verdict(expr.VerdictReturn)),
		// The answer to what came to a link-local address would have to leave by
		// the link that it came in on, which the container does not know; nor is
		// such a packet forwarded. The proxy serves it.
		in("prerouting", isV6LinkLocal(), verdict(expr.VerdictReturn)),
		in("prerouting", toHost(), goTo("publish")),
		// From [::1] nothing can be translated (the kernel does not take the
		// answers back); the proxy behind the held port serves it.
		in("output", isV6Loopback(), verdict(expr.VerdictReturn)),
		in("output", isV6LinkLocal(), verdict(expr.VerdictReturn)),
		in("output", toHost(), goTo("publish")),
	)
	for _, v6 := range families {
		rs = append(rs,
			in("publish", family(v6), dnat("published", v6, daddr(v6), l4proto, dport)),
			in("publish", family(v6), dnat("published_any", v6, l4proto, dport)),
			in("publish", family(v6), dnatAddress("published_range", v6, daddr(v6), l4proto, dport)),
		)
	}
	return rs
}

// fromMembers: the tunnels of networks that span hosts. The kernel's device takes
// their packets from anybody, by any address of the host; we take them from hosts
// that have a network of ours, and let nobody send them to such a host but another
// one. What a container sends with the source address of a member comes by a
// bridge that does not lead there. Several instances may use one port, each for
// networks and hosts of its own: one that knows the sender lets the packet off
// tracking, and that is what the others, in their turn, take for a yes.
func fromMembers() []rule {
	rs := []rule{in("tunnel", isBridge(metaIIFKind), cameAstray(), verdict(expr.VerdictAccept))}
	for _, v6 := range families {
		members := suffix("members", v6)
		rs = append(rs,
			in("tunnel", family(v6), isIn(members, saddr(v6), dport), untracked()),
			in("raw_output", isByte(l4proto, unix.IPPROTO_UDP), family(v6), isIn(members, daddr(v6), dport), untracked()),
		)
	}
	rs = append(rs,
		in("strangers", isByte(l4proto, unix.IPPROTO_UDP), isIn("tunnels", dport), goTo("stranger")),
		in("stranger", ctBits(expr.CtKeySTATE, expr.CtStateBitUNTRACKED), verdict(expr.VerdictAccept)),
		in("stranger", toHost(), drop()),
	)
	// The device's socket takes what is for everybody as well.
	for _, to := range []uint32{unix.RTN_BROADCAST, unix.RTN_MULTICAST, unix.RTN_ANYCAST} {
		rs = append(rs, in("stranger", addressed(to), drop()))
	}
	for _, v6 := range families {
		rs = append(rs, in("stranger", family(v6), isIn(suffix("members", v6), daddr(v6), dport), drop()))
	}
	return rs
}

// forward sorts the packets that pass through the host. Frames inside one
// bridge come here too where br_netfilter is on; both links are the bridge.
func forward() []rule {
	rs := []rule{
		in("forward", isIn("pass", iif, oif), goTo("ok")),
		in("forward", isIn("internal", iif), drop()),
		in("forward", isIn("internal", oif), drop()),
		in("forward", isIn("switched", iif), drop()),
		in("forward", isIn("switched", oif), drop()),
		in("forward", isIn("bridges", oif), goTo("to_bridge")),
	}
	for _, v6 := range families {
		att := suffix("attached", v6)
		rs = append(rs,
			in("forward", family(v6), isIn(att, oif, daddr(v6)), goTo("ok")),
			// In and out by the bridge that the source is on: not routed.
			in("forward", family(v6), isIn(att, oif, saddr(v6)), isIn(att, iif, saddr(v6)), goTo("ok")),
		)
	}
	rs = append(rs, in("forward", isIn("bridges", iif), goTo("from_bridge")))
	for _, v6 := range families {
		rs = append(rs, in("forward", family(v6), isIn(suffix("attached", v6), iif, saddr(v6)), goTo("from_bridge")))
	}
	return rs
}

// toBridge decides what reaches the containers of our bridges.
func toBridge() []rule {
	rs := []rule{
		in("to_bridge", ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), goTo("ok")),
		in("to_bridge", ctBits(expr.CtKeySTATUS, ctStatusDNAT), goTo("ok")),
		// From a network without ICC to itself; to others it is kept in as well.
		in("to_bridge", isIn("bridges", iif), isNotIn("pass", iif, iif), drop()),
	}
	// What follows is open to everybody, other networks on this host included. Where
	// those are somebody else's, the engine for one, he decides first (see hook).
	for _, v6 := range families {
		icmp, echo := byte(unix.IPPROTO_ICMP), byte(8)
		if v6 {
			icmp, echo = unix.IPPROTO_ICMPV6, 128
		}
		rs = append(rs,
			in("to_bridge", family(v6), isIn(suffix("exposed", v6), daddr(v6), l4proto, dport), goTo("ok")),
			in("to_bridge", family(v6), isIn(suffix("trusted", v6), iif, daddr(v6), l4proto, dport), goTo("ok")),
			in("to_bridge", family(v6), isIn(suffix("exposed_range", v6), daddr(v6), l4proto, dport), goTo("ok")),
			in("to_bridge", family(v6), isIn(suffix("trusted_range", v6), daddr(v6), l4proto, dport, iif), goTo("ok")),
			in("to_bridge", family(v6), isByte(l4proto, icmp), isByte(icmpType, echo), isIn(suffix("routed", v6), oif), goTo("ok")),
			in("to_bridge", family(v6), isIn(suffix("open", v6), oif), goTo("ok")),
		)
	}
	return append(rs, in("to_bridge", drop()))
}

// fromBridge decides what leaves from containers.
func fromBridge() []rule {
	rs := []rule{
		in("from_bridge", ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), goTo("ok")),
	}
	// What conntrack cannot place is not translated either: it would leave
	// with the container's address. Routed networks may have asymmetric paths
	// where this is normal, so only what would be masqueraded is stopped.
	for _, v6 := range families {
		rs = append(rs, in("from_bridge", ctBits(expr.CtKeySTATE, expr.CtStateBitINVALID),
			family(v6), isIn(suffix("masquerade", v6), saddr(v6)), drop()))
	}
	return append(rs,
		// Towards somebody else's network its owner decides: no mark.
		in("from_bridge", isBridge(metaOIFKind), isNotIn("uplinks", oif), verdict(expr.VerdictReturn)),
		in("from_bridge", goTo("ok")),
		in("ok", allow(), verdict(expr.VerdictAccept)),
	)
}

// guard: packets between two links that are nobody's containers, on a host
// where forwarding was off until we needed it. It comes after the forward chains
// of all instances, and leaves alone what one of them has marked: no link shows
// that a LAN container is another instance's. Only positive tests of the
// kind of a link: a physical one has no kind, and any comparison with that,
// "is not" included, fails (nft_meta_get_eval_kind).
func guard() []rule {
	return []rule{
		in("guard", isNotIn("guard", nfproto), verdict(expr.VerdictAccept)),
		in("guard", isIn("lifted", nfproto), verdict(expr.VerdictAccept)),
		in("guard", allowed(), verdict(expr.VerdictAccept)),
		in("guard", isBridge(metaIIFKind), isNotIn("uplinks", iif), verdict(expr.VerdictAccept)),
		in("guard", isBridge(metaOIFKind), isNotIn("uplinks", oif), verdict(expr.VerdictAccept)),
		// Frames within the host's own bridge.
		in("guard", isBridge(metaIIFKind), isBridge(metaOIFKind), verdict(expr.VerdictAccept)),
		in("guard", drop()),
	}
}

// postrouting: the source address of what goes out.
func postrouting() []rule {
	var rs []rule
	for _, v6 := range families {
		// From the host to a LAN container that knows the way back: the host's
		// address stays, and a translation to it keeps others from translating
		// it to something else.
		rs = append(rs, in("postrouting", family(v6), isIn(suffix("near", v6), saddr(v6), daddr(v6)), keepSource(v6)))
	}
	rs = append(rs,
		// A published port used from the host by 127.0.0.1; the container
		// could not answer that address.
		in("postrouting", ctBits(expr.CtKeySTATUS, ctStatusDNAT), loopback(12), isIn("bridges", oif), masquerade()),
	)
	for _, v6 := range families {
		// A published port used from the same subnet: the answer must come
		// back through the host.
		rs = append(rs, in("postrouting", ctBits(expr.CtKeySTATUS, ctStatusDNAT),
			family(v6), isIn(suffix("hairpin", v6), saddr(v6), oif), masquerade()),
			// Or from a LAN that the container has a link to, by which it
			// would answer past the host.
			in("postrouting", ctBits(expr.CtKeySTATUS, ctStatusDNAT),
				family(v6), isIn(suffix("beside", v6), saddr(v6), daddr(v6)), masquerade()),
			// On a bridge that is not ours the container's way back may lead
			// past the host, whoever asked.
			in("postrouting", ctBits(expr.CtKeySTATUS, ctStatusDNAT),
				family(v6), isIn(suffix("attached", v6), oif, daddr(v6)), masquerade()))
	}
	for _, v6 := range families {
		// Nor does a LAN container know the way back to anybody else but
		// the host's own sub-interface.
		rs = append(rs, in("postrouting", isIn("own", oif), family(v6), isIn(suffix("attached", v6), oif, daddr(v6)), masquerade()))
	}
	rs = append(rs, in("postrouting", isIn("bridges", oif), verdict(expr.VerdictReturn)))
	for _, v6 := range families {
		rs = append(rs,
			// Frames that stay on a bridge that is not ours come here with
			// br_netfilter: those of our endpoints, and those of others.
			in("postrouting", family(v6), isIn(suffix("attached", v6), oif, saddr(v6)), verdict(expr.VerdictReturn)),
			in("postrouting", family(v6), isIn(suffix("home", v6), saddr(v6), oif), verdict(expr.VerdictReturn)),
			in("postrouting", family(v6), snat("snat", v6, saddr(v6))),
			in("postrouting", family(v6), isIn(suffix("masquerade", v6), saddr(v6)), masquerade()),
		)
	}
	return rs
}

// The rest are the words of the rules above.

func in(chain string, parts ...[]expr.Any) rule {
	return rule{chain: chain, exprs: slices.Concat(parts...)}
}

func suffix(name string, v6 bool) string {
	if v6 {
		return name + "6"
	}
	return name + "4"
}

// source puts a property of the packet into a register; regs is how many
// registers it fills.
type source struct {
	load func(reg uint32) expr.Any
	regs uint32
}

func meta(key expr.MetaKey, regs uint32) source {
	return source{func(reg uint32) expr.Any { return &expr.Meta{Key: key, Register: reg} }, regs}
}

func payload(base expr.PayloadBase, offset, length uint32) source {
	return source{func(reg uint32) expr.Any {
		return &expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length}
	}, (length + 3) / 4}
}

var (
	iif      = meta(expr.MetaKeyIIFNAME, 4)
	oif      = meta(expr.MetaKeyOIFNAME, 4)
	l4proto  = meta(expr.MetaKeyL4PROTO, 1)
	nfproto  = meta(expr.MetaKeyNFPROTO, 1)
	dport    = payload(expr.PayloadBaseTransportHeader, 2, 2)
	icmpType = payload(expr.PayloadBaseTransportHeader, 0, 1)
)

func saddr(v6 bool) source {
	if v6 {
		return payload(expr.PayloadBaseNetworkHeader, 8, 16)
	}
	return payload(expr.PayloadBaseNetworkHeader, 12, 4)
}

func daddr(v6 bool) source {
	if v6 {
		return payload(expr.PayloadBaseNetworkHeader, 24, 16)
	}
	return payload(expr.PayloadBaseNetworkHeader, 16, 4)
}

// concat loads the parts into registers one after the other.
func concat(parts ...source) []expr.Any {
	var es []expr.Any
	reg := uint32(firstRegister)
	for _, p := range parts {
		es = append(es, p.load(reg))
		reg += p.regs
	}
	return es
}

func isIn(set string, key ...source) []expr.Any {
	return append(concat(key...), &expr.Lookup{SourceRegister: firstRegister, SetName: set})
}

func isNotIn(set string, key ...source) []expr.Any {
	return append(concat(key...), &expr.Lookup{SourceRegister: firstRegister, SetName: set, Invert: true})
}

func is(s source, value []byte) []expr.Any {
	return append(concat(s), &expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: value})
}

func isByte(s source, value byte) []expr.Any { return is(s, []byte{value}) }

func family(v6 bool) []expr.Any {
	if v6 {
		return isByte(nfproto, unix.NFPROTO_IPV6)
	}
	return isByte(nfproto, unix.NFPROTO_IPV4)
}

// loopback matches 127.0.0.0/8 at the offset of an address in the header.
func loopback(offset uint32) []expr.Any {
	return slices.Concat(family(false), isByte(payload(expr.PayloadBaseNetworkHeader, offset, 1), 127))
}

func isV6Loopback() []expr.Any {
	return slices.Concat(family(true), is(daddr(true), append(make([]byte, 15), 1)))
}

// isV6LinkLocal matches if the destination is in fe80::/10.
func isV6LinkLocal() []expr.Any {
	return slices.Concat(family(true), concat(payload(expr.PayloadBaseNetworkHeader, 24, 2)), []expr.Any{
		&expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: []byte{0xfe, 0x80}},
	})
}

// isLoopback matches what comes in by a loopback interface.
func isLoopback() []expr.Any {
	return is(meta(expr.MetaKeyIIFTYPE, 1), binaryutil.NativeEndian.PutUint16(unix.ARPHRD_LOOPBACK))
}

// isBridge matches if the link in question is a bridge, of anybody.
func isBridge(key expr.MetaKey) []expr.Any { return isKind(key, "bridge") }

// isKind matches if the link in question is of that kind.
func isKind(key expr.MetaKey, name string) []expr.Any {
	kind := make([]byte, unix.IFNAMSIZ)
	copy(kind, name)
	return is(meta(key, 4), kind)
}

// toHost matches if the destination is an address of the host.
func toHost() []expr.Any { return addressed(unix.RTN_LOCAL) }

// addressed matches if the destination is of that type.
func addressed(kind uint32) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: firstRegister, ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: binaryutil.NativeEndian.PutUint32(kind)},
	}
}

// cameAstray matches if the host's route to the source is not by the link that
// the packet came in on.
func cameAstray() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: firstRegister, ResultOIF: true, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: make([]byte, 4)},
	}
}

// ctBits matches if the connection has one of the bits.
func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: firstRegister},
		&expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: firstRegister, Data: make([]byte, 4)},
	}
}

// allow sets our bit of the packet's mark.
func allow() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: firstRegister},
		&expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^uint32(acceptMark)), Xor: binaryutil.NativeEndian.PutUint32(acceptMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: firstRegister, SourceRegister: true},
	}
}

// allowed matches if our bit of the packet's mark is set.
func allowed() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: firstRegister},
		&expr.Bitwise{SourceRegister: firstRegister, DestRegister: firstRegister, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(acceptMark), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: firstRegister, Data: make([]byte, 4)},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// untracked keeps the packet out of connection tracking.
func untracked() []expr.Any { return []expr.Any{&expr.Notrack{}} }

func drop() []expr.Any { return verdict(expr.VerdictDrop) }

func goTo(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

// dnat translates the destination to the address and port in the map.
func dnat(name string, v6 bool, key ...source) []expr.Any {
	n := nat(name, v6, key...)
	n[len(n)-1].(*expr.NAT).Type = expr.NATTypeDestNAT
	n[len(n)-1].(*expr.NAT).RegProtoMin = firstRegister + daddr(v6).regs
	return n
}

// dnatAddress translates the destination to the address in the map, and leaves
// the port.
func dnatAddress(name string, v6 bool, key ...source) []expr.Any {
	n := nat(name, v6, key...)
	n[len(n)-1].(*expr.NAT).Type = expr.NATTypeDestNAT
	return n
}

// snat translates the source to the address in the map.
func snat(name string, v6 bool, key ...source) []expr.Any {
	n := nat(name, v6, key...)
	n[len(n)-1].(*expr.NAT).Type = expr.NATTypeSourceNAT
	return n
}

func nat(name string, v6 bool, key ...source) []expr.Any {
	return append(concat(key...),
		&expr.Lookup{SourceRegister: firstRegister, DestRegister: firstRegister, IsDestRegSet: true, SetName: suffix(name, v6)},
		&expr.NAT{Family: natFamily(v6), RegAddrMin: firstRegister},
	)
}

func natFamily(v6 bool) uint32 {
	if v6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// keepSource translates the source to itself, which settles the question.
func keepSource(v6 bool) []expr.Any {
	return append(concat(saddr(v6)), &expr.NAT{Type: expr.NATTypeSourceNAT, Family: natFamily(v6), RegAddrMin: firstRegister})
}
