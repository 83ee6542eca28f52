package datapath

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// localnet is the filter at the entry of our links that have route_localnet on. It
// drops what the chain loopback drops, and stays when somebody flushes the rules
// while we are not there to restore them. It is classic BPF: that takes no privilege
// but CAP_NET_ADMIN and one module, cls_bpf, where u32 needs a second for its drop.
type localnet struct {
	other  string      // tests have a kind of filter that no kernel has
	lacked atomic.Bool // the kernel has no such filter, as we have said
}

func (l *localnet) kind() string { return cmp.Or(l.other, "bpf") }

const (
	clsact       = 0xffff0000 // the handle of a qdisc of that kind, or of kind ingress
	clsactParent = 0xfffffff1
	atEntry      = 0xfffffff2 // the parent of filters for what comes in
	localnetID   = 1
	localnetPrio = 127 // before those that get theirs from the kernel
)

// localnetProgram counts from the Ethernet header: loads that count from the IP
// header do not see beyond a packet's first fragment of memory, and a container can
// send packets that have only the Ethernet header there. One VLAN tag the kernel has
// taken off by now; below another it would find 127.0.0.0/8 further back, after us.
// With br_netfilter a bridge is entered by what the table has translated back to
// 127.0.0.1, and has marked: no other has the mark, containers cannot set it.
func localnetProgram() []unix.SockFilter {
	const (
		word   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		load   = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		anyBit = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K

		ether, drop, next = 14, 2, 0xffffffff // TC_ACT_SHOT, TC_ACT_UNSPEC
		protocol          = 0xfffff000        // SKF_AD_OFF + SKF_AD_PROTOCOL
		mark              = 0xfffff014        // SKF_AD_OFF + SKF_AD_MARK
	)
	return []unix.SockFilter{
		{Code: word, K: protocol},
		{Code: equal, K: unix.ETH_P_8021Q, Jt: 9},
		{Code: equal, K: unix.ETH_P_8021AD, Jt: 8},
		{Code: equal, K: unix.ETH_P_IP, Jf: 6},
		{Code: load, K: ether + 12}, // where from
		{Code: equal, K: 127, Jt: 5},
		{Code: load, K: ether + 16}, // where to
		{Code: equal, K: 127, Jf: 2},
		{Code: word, K: mark},
		{Code: anyBit, K: acceptMark, Jf: 1},
		{Code: ret, K: next},
		{Code: ret, K: drop},
	}
}

// setBridge sets a bridge's sysctls once the filter stands.
func (k *Kernel) setBridge(b Bridge, d *done) error {
	if has4, _ := bothFamilies(b.Addrs); has4 {
		if err := k.closeLocalnet("bridge", b.Name, d); err != nil {
			return err
		}
	}
	return k.sysctl.bridge(b, d)
}

// setChild does the same for the host's own sub-interface.
func (k *Kernel) setChild(c Child, d *done) error {
	if err := k.closeLocalnet(c.Kind, c.Name, d); err != nil {
		return err
	}
	return k.sysctl.child(c, d)
}

// closeLocalnet comes before route_localnet. A kernel that lacks the filter leaves
// the table alone to drop such packets.
func (k *Kernel) closeLocalnet(kind, name string, d *done) error {
	if k.localnet.lacked.Load() {
		return nil
	}
	index, err := k.links.index(name)
	if err != nil {
		return fmt.Errorf("%s %s: %w", kind, name, err)
	}
	err = k.links.change.addLocalnet(index, k.localnet.kind())
	if err != nil && !errors.Is(err, unix.EEXIST) { // as a rule there is no qdisc yet
		if err = k.links.change.addClsact(index); err == nil || errors.Is(err, unix.EEXIST) {
			err = k.links.change.addLocalnet(index, k.localnet.kind())
		}
	}
	switch {
	case err == nil:
		d.say("%s %s: 127.0.0.0/8 dropped at its entry", kind, name)
	case errors.Is(err, unix.EEXIST):
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
		if !k.localnet.lacked.Swap(true) {
			k.log.WithError(err).Warn("this kernel lacks sch_ingress or cls_bpf: whoever flushes the firewall while the plugin is stopped lets containers reach what the host serves on 127.0.0.1")
		}
	default:
		return fmt.Errorf("%s %s: drop 127.0.0.0/8 at its entry: %w", kind, name, err)
	}
	return nil
}

// ownedLinks returns what is ours among all, and marks the links that should have the
// filter and do not. It asks for each by its number: there are as many as networks.
func (k *Kernel) ownedLinks(ctx context.Context, all []link) (State, error) {
	s, err := k.links.owned(ctx, all)
	if err != nil || k.localnet.lacked.Load() {
		return s, err
	}
	open := func(name string) bool {
		index, e := k.links.index(name)
		if e == nil {
			e = k.links.dumps.getLocalnet(index, k.localnet.kind())
		}
		switch {
		case e == nil, errors.Is(e, ErrAbsent), errors.Is(e, unix.ENODEV):
			return false // it is there, or the link has gone
		case errors.Is(e, unix.ENOENT), errors.Is(e, unix.EINVAL):
			return true // no filter, or not even a qdisc
		}
		err = errors.Join(err, fmt.Errorf("look for the filter of %s: %w", name, e))
		return false
	}
	for i, b := range s.Bridges {
		if has4, _ := bothFamilies(b.Addrs); has4 {
			s.Bridges[i].Open = open(b.Name)
		}
	}
	for i, c := range s.Children {
		if c.Stays {
			s.Children[i].Open = open(c.Name)
		}
	}
	return s, err
}

func (c *rtnl) trafficControl(message, flags, index int, handle, parent, info uint32, kind string) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(message, flags)
	req.Sockets = c.sockets
	req.AddData(&nl.TcMsg{Ifindex: int32(index), Handle: handle, Parent: parent, Info: info})
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated(kind)))
	return req
}

func (c *rtnl) addClsact(index int) error {
	req := c.trafficControl(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, index, clsact, clsactParent, 0, "clsact")
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func (c *rtnl) localnet(message, flags, index int, kind string) *nl.NetlinkRequest {
	all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
	return c.trafficControl(message, flags, index, localnetID, atEntry, localnetPrio<<16|uint32(all), kind)
}

func (c *rtnl) addLocalnet(index int, kind string) error {
	req := c.localnet(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, index, kind)
	var code []byte
	program := localnetProgram()
	for _, x := range program {
		code = binary.NativeEndian.AppendUint16(code, x.Code)
		code = append(code, x.Jt, x.Jf)
		code = binary.NativeEndian.AppendUint32(code, x.K)
	}
	options := nl.NewRtAttr(nl.TCA_OPTIONS, nil)
	options.AddRtAttr(nl.TCA_BPF_OPS_LEN, nl.Uint16Attr(uint16(len(program))))
	options.AddRtAttr(nl.TCA_BPF_OPS, code)
	options.AddRtAttr(nl.TCA_BPF_FLAGS, nl.Uint32Attr(nl.TCA_BPF_FLAG_ACT_DIRECT))
	req.AddData(options)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func (c *rtnl) getLocalnet(index int, kind string) error {
	_, err := c.localnet(unix.RTM_GETTFILTER, 0, index, kind).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWTFILTER)
	return err
}
