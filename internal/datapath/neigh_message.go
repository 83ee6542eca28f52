package datapath

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// batchSize is how many requests go into one write. Refusals wait in the
// socket's receive buffer, 208 KiB by default, where each of them takes about 1.
const batchSize = 128

// serve has the kernel serve requests, whatever becomes of single ones, and
// returns its answers; if there is an error, to the batches before it.
func (c *rtnl) serve(ctx context.Context, reqs []*nl.NetlinkRequest) (answers []error, err error) {
	for len(reqs) > 0 {
		if err := ctx.Err(); err != nil {
			return answers, err
		}
		n := min(batchSize, len(reqs))
		list, err := c.batch(reqs[:n])
		if answers = append(answers, list...); err != nil {
			return answers, err
		}
		reqs = reqs[n:]
	}
	return answers, nil
}

// batch does it with one write and one acknowledgement.
func (c *rtnl) batch(reqs []*nl.NetlinkRequest) ([]error, error) {
	sh := c.sockets[unix.NETLINK_ROUTE]
	s := sh.Socket
	s.Lock()
	defer s.Unlock()
	// Without NLM_F_ACK the kernel answers only what it refuses: the answer to
	// the last request is the end of them.
	reqs[len(reqs)-1].Flags |= unix.NLM_F_ACK
	errs := make([]error, len(reqs))
	place := make(map[uint32]int, len(reqs))
	var b []byte
	for i, r := range reqs {
		r.Seq = atomic.AddUint32(&sh.Seq, 1)
		place[r.Seq] = i
		b = append(b, r.Serialize()...) // a multiple of 4 bytes, as they have to begin at one
	}
	if err := unix.Sendto(s.GetFd(), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	for {
		msgs, _, err := s.Receive()
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			i, known := place[m.Header.Seq]
			if !known || m.Header.Type != unix.NLMSG_ERROR {
				continue // an answer that somebody gave up waiting for
			}
			if errs[i] = answer(m); i == len(reqs)-1 {
				return errs, nil
			}
		}
	}
}

// answer reads an NLMSG_ERROR message: an error number, 0 for none, the request
// that it is about, and the kernel's own words.
func answer(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4+unix.SizeofNlMsghdr {
		return fmt.Errorf("netlink answer of %d bytes", len(m.Data))
	}
	errno := int32(binary.NativeEndian.Uint32(m.Data))
	if errno == 0 {
		return nil
	}
	err := error(unix.Errno(-errno))
	echo := (int(binary.NativeEndian.Uint32(m.Data[4:])) + 3) &^ 3
	if m.Header.Flags&unix.NLM_F_ACK_TLVS == 0 || echo > len(m.Data)-4 {
		return err
	}
	const message = 1 // NLMSGERR_ATTR_MSG
	_ = eachAttr(m.Data[4+echo:], func(kind uint16, b []byte) error {
		if kind == message {
			err = fmt.Errorf("%w: %s", err, unix.ByteSliceToString(b))
		}
		return nil
	})
	return err
}

// neigh is an entry of a neighbour table or of a forwarding database: the
// kernel has one message for both.
type neigh struct {
	family byte // AF_INET, AF_INET6, or AF_BRIDGE for a forwarding entry
	index  int
	state  uint16 // NUD_*
	flags  byte   // NTF_*
	mac    MAC
	dst    netip.Addr
	// Of forwarding entries that are read: it is one of the port's bridge, and it
	// is there for a VLAN.
	master, vlan bool
}

// request is a message about the entry; the zero dst is left out.
func (n neigh) request(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.AddData(&netlink.Ndmsg{Family: n.family, Index: uint32(n.index), State: n.state, Flags: n.flags})
	if n.dst.IsValid() {
		req.AddData(nl.NewRtAttr(unix.NDA_DST, n.dst.AsSlice()))
	}
	req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, n.mac[:]))
	return req
}

// entries returns the neighbour entries of a link, of both families.
func (c *rtnl) entries(index int) ([]neigh, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP)
	req.AddData(&netlink.Ndmsg{})
	req.AddData(nl.NewRtAttr(unix.NDA_IFINDEX, nl.Uint32Attr(uint32(index))))
	return c.neighs(req, index)
}

// forwarding returns the entries of a bridge port in its own forwarding
// database and in that of its bridge.
func (c *rtnl) forwarding(index int) ([]neigh, error) {
	// The kernel looks at the index only in the header of a link message, and
	// ignores the one of its own kind of message.
	info := linkInfo(index, false)
	info.Family = unix.AF_BRIDGE
	return c.neighs(c.request(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, info), index)
}

func (c *rtnl) neighs(req *nl.NetlinkRequest, index int) ([]neigh, error) {
	req.Sockets = c.sockets
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if err != nil {
		return nil, err
	}
	list := make([]neigh, 0, len(msgs))
	for _, msg := range msgs {
		n, err := parseNeigh(msg)
		if err != nil {
			return nil, err
		}
		if n.index == index {
			list = append(list, n)
		}
	}
	return list, nil
}

// parseNeigh reads one RTM_NEWNEIGH message without its netlink header.
func parseNeigh(msg []byte) (neigh, error) {
	var n neigh
	if len(msg) < unix.SizeofNdMsg {
		return n, fmt.Errorf("neighbour message of %d bytes", len(msg))
	}
	n.family, n.flags = msg[0], msg[10]
	n.index = int(int32(binary.NativeEndian.Uint32(msg[4:8])))
	n.state = binary.NativeEndian.Uint16(msg[8:10])
	err := eachAttr(msg[unix.SizeofNdMsg:], func(kind uint16, b []byte) error {
		switch kind {
		case unix.NDA_DST:
			n.dst, _ = netip.AddrFromSlice(b)
		case unix.NDA_LLADDR:
			if len(b) == len(n.mac) {
				n.mac = MAC(b)
			}
		case unix.NDA_MASTER:
			n.master = true
		case unix.NDA_VLAN:
			n.vlan = true
		}
		return nil
	})
	return n, err
}
