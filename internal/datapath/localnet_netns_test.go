package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"
)

// udpFrame is a datagram to port 7000 behind that many tags of VLAN 0, which the
// kernel takes off.
func udpFrame(to, from MAC, tags int, src, dst netip.Addr) []byte {
	ip := []byte{0x45, 0, 0, 29, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, src.AsSlice()...), dst.AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	f := slices.Concat(to[:], from[:], slices.Repeat([]byte{0x81, 0, 0, 0}, tags), []byte{8, 0}, ip)
	return append(f, 0x30, 0x39, 7000>>8, 7000&0xff, 0, 9, 0, 0, '?')
}

// Our links route 127.0.0.0/8: nobody beside the host may use that, even while the
// table is gone and we are not running.
func TestLocalnetClosedWithoutTable(t *testing.T) {
	for _, bridgeNF := range []bool{true, false} {
		t.Run(fmt.Sprintf("brnf=%t", bridgeNF), func(t *testing.T) { localnetClosed(t, newWorld(t, bridgeNF)) })
	}
}

func localnetClosed(t *testing.T, w *world) {
	t.Helper()
	k, err := New(Config{Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	w.serve("host", 7000)
	w.neighbour("l1", "lan0", 161)
	w.ns["l1"].Exec("ip", "link", "set", "eth0", "address", mac(5).String())
	gw, lan := subnet(160, 1), subnet(161, 2)
	s := State{
		Bridges: []Bridge{{Name: "wfk", MAC: mac(1), MTU: 1500, Addrs: gw[:]}},
		Children: []Child{{Name: "wfsl", Parent: "lan0", Kind: kindMacvlan, Mode: "bridge", MTU: 1500, MAC: mac(9), Stays: true,
			Addrs: []netip.Prefix{prefix("169.254.7.7/32")}}},
		Routes:   []Route{{Link: "wfsl", To: lan[0].Addr(), MAC: mac(5), From: "lan0"}},
		Forward4: true, Forward6: true,
		Elements: append(plain("wfk", 160), Element{Set: SetOwn, Link: "wfsl"}),
	}
	ensure(t, k, s)
	w.container("k1", "wfk", 160, 2)
	port := w.published([2]netip.Prefix{prefix("127.0.0.1/32"), prefix("::1/128")}, 83, "k1", 8080)
	s.Elements = append(s.Elements, port...)
	ensure(t, k, s)
	w.ns["l1"].Exec("ip", "neigh", "replace", "10.161.0.1", "lladdr", mac(9).String(), "dev", "eth0")
	for name, gw := range map[string]string{"k1": "10.160.0.1", "l1": "10.161.0.1"} {
		w.ns[name].Exec("sh", "-ec", "ip route del local 127.0.0.0/8 dev lo table local; ip route del local 127.0.0.1 dev lo table local; ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via "+gw+"; echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet")
	}
	w.sysctl("ipv4/conf/all/rp_filter", "0")
	w.sysctl("ipv4/conf/wfk/rp_filter", "0")
	closed := []probe{{"k1", "local:7000", ""}, {"l1", "local:7000", ""}, {"k1", "host:7000", "host:7000 k1"}, {"l1", "host:7000", "host:7000 l1"}}
	w.run(0, append([]probe{{"host", "local:83", "k1:8080 gw160"}, {"host", "k1:8080", "k1:8080 gw160"}, {"out", "host:7000", "host:7000 out"}}, closed...))

	w.host.Exec("nft", "flush", "ruleset")
	w.run(0, closed)
	if got := w.forged(); len(got) != 0 {
		t.Errorf("the host heard %q", got)
	}
	w.host.Exec("sh", "-ec", "tc qdisc del dev wfk clsact; tc qdisc del dev wfsl clsact")
	w.run(0, []probe{{"k1", "local:7000", "host:7000 k1"}, {"l1", "local:7000", "host:7000 l1"}}) // or the test would show nothing
	if got := w.forged(); len(got) != 4 {
		t.Errorf("without the filter the host heard only %q", got)
	}

	lack := s.Minus(owned(t, k))
	if len(lack.Bridges) != 1 || len(lack.Children) != 1 {
		t.Errorf("Owned does not show the damage, it lacks only:\n%s", lack)
	}
	lines := ensure(t, k, State{Bridges: s.Bridges, Children: s.Children})
	if want := []string{"bridge wfk: 127.0.0.0/8 dropped at its entry", "macvlan wfsl: 127.0.0.0/8 dropped at its entry"}; !slices.Equal(lines, want) {
		t.Errorf("mended %q, want %q", lines, want)
	}
	w.run(0, closed)
	ensure(t, k, s)
	same(t, k, s)
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("mended again: %q", lines)
	}
	w.run(0, append([]probe{{"host", "local:83", "k1:8080 gw160"}}, closed...))
	// An ingress qdisc of somebody else's will do.
	w.host.Exec("sh", "-ec", "tc qdisc del dev wfk clsact; tc qdisc add dev wfk ingress")
	ensure(t, k, s)
	same(t, k, s)
	remove(t, k, s)
	same(t, k, State{Forward4: true, Forward6: true})
}

// forged sends from k1 what its kernel would not, and returns whom the host heard.
func (w *world) forged() (heard []string) {
	w.t.Helper()
	w.mu.Lock()
	clear(w.heard)
	w.mu.Unlock()
	host, home := subnet(200, 1)[0].Addr(), netip.MustParseAddr("127.0.0.1")
	froms := []string{"10.160.0.7", "10.160.0.8", "10.160.0.9", "127.0.0.2"}
	w.ns["k1"].Do(func() {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			w.t.Fatal(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			w.t.Fatal(err)
		}
		for tags, from := range froms {
			to := home
			if from == "127.0.0.2" {
				to, tags = host, 0
			}
			f := udpFrame(mac(1), MAC(i.HardwareAddr), tags, netip.MustParseAddr(from), to)
			err = errors.Join(err, unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: i.Index}))
		}
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			w.t.Fatal(err)
		}
	})
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end) && len(heard) < len(froms); time.Sleep(20 * time.Millisecond) {
		w.mu.Lock()
		heard = slices.DeleteFunc(slices.Clone(froms), func(from string) bool { return !w.heard["host "+from] })
		w.mu.Unlock()
	}
	return heard
}

// A kernel without the filter is told of once, and is as safe as the table.
func TestLocalnetWithoutFilter(t *testing.T) {
	k, _ := newKernel(t)
	log, said := logtest.NewNullLogger()
	k.log, k.localnet.other = log, "none"
	s := network()
	s.Elements, s.Sockets = nil, nil
	ensure(t, k, s)
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("the second time changed %q", lines)
	}
	same(t, k, s)
	if all := said.AllEntries(); len(all) != 1 || !strings.Contains(all[0].Message, "cls_bpf") {
		t.Errorf("said %v, want one line", all)
	}
}
