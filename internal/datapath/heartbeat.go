package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// heartbeatType is for local experiments (IEEE 802, 9.2.3).
	heartbeatType = 0x88b5
	// mostHeartbeat is what every tunnel carries.
	mostHeartbeat = 1200 // bytes
	// mostTunnels is how many tunnels are listened to: a filter has so many jumps.
	mostTunnels = 250
)

// nearestBridge is an address whose frames no bridge passes on (IEEE 802.1Q, table
// 8-1): what comes by a tunnel with it ends at the bridge, no container sees it, and
// what a container sends with it gets into no tunnel.
var nearestBridge = MAC{0x01, 0x80, 0xc2, 0, 0, 0x0e}

// Heartbeat is what hosts say to each other through the tunnels themselves, so that
// they know whether containers' traffic gets through.
type Heartbeat struct {
	Every time.Duration
	// Tunnels are those of ours, by the names of their links.
	Tunnels func() []string
	// Say is what to say through one, at most 1200 bytes; nil for nothing. It goes to all
	// hosts that the tunnel leads to.
	Say func(tunnel string) []byte
	// Hear is told what came through one. The bytes are its own. Nobody has checked who
	// sent them.
	Hear func(tunnel string, said []byte)
}

// Heartbeat goes on until ctx ends.
func (k *Kernel) Heartbeat(ctx context.Context, h Heartbeat) error {
	s, err := newStethoscope()
	if err != nil {
		return err
	}
	defer func() { _ = s.file.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = s.file.SetReadDeadline(time.Now()) })
	defer stop()
	for ctx.Err() == nil {
		tunnels, err := k.tunnelNumbers(h.Tunnels())
		if err == nil {
			err = s.tune(tunnels)
		}
		if err != nil {
			return err
		}
		for number, name := range tunnels {
			k.speak(number, h.Say(name))
		}
		if err := s.hear(ctx, time.Now().Add(h.Every), func(number int, said []byte) {
			if name, ok := tunnels[number]; ok {
				h.Hear(name, said)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// tunnelNumbers are the links that are there.
func (k *Kernel) tunnelNumbers(names []string) (map[int]string, error) {
	list := map[int]string{}
	for _, name := range names[:min(len(names), mostTunnels)] {
		index, err := k.links.index(name)
		switch {
		case errors.Is(err, ErrAbsent): // made again in a moment
		case err != nil:
			return nil, fmt.Errorf("heartbeat: %w", err)
		default:
			list[index] = name
		}
	}
	return list, nil
}

// speak sends one frame. One that is lost is lost.
func (k *Kernel) speak(link int, said []byte) {
	if len(said) == 0 || len(said) > mostHeartbeat {
		return
	}
	to := unix.SockaddrLinklayer{Ifindex: link, Halen: 6}
	frame := ethernet(nearestBridge, MAC{2, 0, 0, 0, 0, 1}, heartbeatType, said)
	_ = unix.Sendto(k.links.packet, frame, unix.MSG_DONTWAIT, &to)
}

// stethoscope is a socket that hears heartbeats from tunnels. What else is on the host
// does not wake it, and costs nothing: the kernel looks for it by the frame's type.
type stethoscope struct {
	file  *os.File
	tuned []int
}

func newStethoscope() (_ *stethoscope, err error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("heartbeat: open packet socket: %w", err)
	}
	s := &stethoscope{file: os.NewFile(uintptr(fd), "heartbeat"), tuned: []int{-1}}
	if err = s.tune(nil); err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(heartbeatType)})
	}
	if err != nil {
		_ = s.file.Close()
		return nil, fmt.Errorf("heartbeat: bind packet socket: %w", err)
	}
	return s, nil
}

// tune has it hear these links and no others: a container may send such frames too.
func (s *stethoscope) tune(tunnels map[int]string) error {
	var links []int
	for n := range tunnels {
		links = append(links, n)
	}
	slices.Sort(links)
	if slices.Equal(links, s.tuned) {
		return nil
	}
	const ifindex = 0xffffffff&-0x1000 + 8 // SKF_AD_OFF + SKF_AD_IFINDEX
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: ifindex}}
	for i, n := range links {
		filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(n), Jt: uint8(len(links) - i)})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: mostHeartbeat})
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := s.control(func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog)
	})
	if err != nil {
		return fmt.Errorf("heartbeat: filter packet socket: %w", err)
	}
	s.tuned = links
	return nil
}

func (s *stethoscope) control(f func(fd int) error) error {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// hear listens until then, or until ctx ends.
func (s *stethoscope) hear(ctx context.Context, until time.Time, got func(link int, said []byte)) error {
	if err := s.file.SetReadDeadline(until); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	conn, err := s.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	buf := make([]byte, mostHeartbeat)
	for ctx.Err() == nil {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := conn.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		switch link, ok := from.(*unix.SockaddrLinklayer); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return fmt.Errorf("heartbeat: %w", err)
		case rerr != nil && !errors.Is(rerr, unix.EINTR) && !errors.Is(rerr, unix.ENETDOWN):
			return fmt.Errorf("heartbeat: %w", rerr)
		case rerr == nil && ok && n > 0:
			got(link.Ifindex, slices.Clone(buf[:n]))
		}
	}
	return nil
}
