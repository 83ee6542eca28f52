package datapath

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the plugin's process keeps of root's privileges, and with it iptables,
// which it starts.
const privileges = 1<<unix.CAP_NET_ADMIN | // links, addresses, routes, nftables, sysctls of the network
	1<<unix.CAP_NET_RAW | // packet sockets, for ARP and DHCP
	1<<unix.CAP_NET_BIND_SERVICE | // published ports below 1024
	1<<unix.CAP_DAC_OVERRIDE // the state's directory belongs to another user where the engine remaps users

// DropPrivileges gives up for good, in all threads and for what they start,
// every privilege that the plugin does not use.
func DropPrivileges() error {
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if privileges&(1<<c) != 0 {
			continue
		}
		err := prctl(unix.PR_CAPBSET_DROP, uintptr(c))
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
			break // the kernel knows no more; or who started us has chosen, and left out CAP_SETPCAP
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range sets {
		keep := uint32(uint64(privileges) >> (32 * i)) //nolint:gosec // a half of it
		sets[i].Effective &= keep
		sets[i].Permitted &= keep
		sets[i].Inheritable = 0
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets[0])), 0); errno != 0 {
		return fmt.Errorf("give up capabilities: %w", errno)
	}
	if err := prctl(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// prctl is the call of that name in all threads of the process. A binary with
// cgo, as the race detector makes it, cannot do that.
func prctl(option, arg uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, arg, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
