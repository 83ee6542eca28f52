package datapath

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/internal/netnstest"
)

// served is a network with one container that echoes what comes to port 8080 of the
// protocols, and a client on the LAN beside the host, 192.0.2.1.
func served(t *testing.T) (k *Kernel, host, client *netnstest.NS, s State) {
	t.Helper()
	k, host = newKernel(t)
	s = network()
	s.Elements, s.Sockets = []Element{{Set: SetBridges, Link: "wfnet"}}, nil
	ensure(t, k, s)
	c := netnstest.New(t)
	c.Take("wfap", "eth0", prefix("10.7.0.2/24"))
	c.Gateway(netip.MustParseAddr("10.7.0.1"))
	reachable(t, "10.7.0.2")
	c.Do(func() {
		l, err := net.Listen("tcp4", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go echo(l)
		p, err := net.ListenPacket("udp4", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		go func() {
			buf := make([]byte, 100)
			for {
				_, from, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = p.WriteTo([]byte("container"), from)
			}
		}()
	})
	client = netnstest.New(t)
	host.Exec("sh", "-ec", "ip link add lan type veth peer name lan2; ip addr add 192.0.2.1/24 dev lan; ip link set lan up; sysctl -qw net.ipv4.ip_forward=1")
	client.Take("lan2", "eth0", prefix("192.0.2.9/24"))
	return k, host, client, s
}

// echo answers one byte for each that comes, until the listener ends.
func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = c.Close() }()
			buf := make([]byte, 1)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				_, _ = c.Write(buf)
			}
		}()
	}
}

func portTo(p Proto, to string) []Element {
	return []Element{{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: p, Port: 8080, To: netip.MustParseAddr(to), ToPort: 8080}}
}

// TestTCPEndsWithItsPort: a connection to a port that was given up, or that leads to
// another container since, is reset when its client speaks next.
func TestTCPEndsWithItsPort(t *testing.T) {
	for name, after := range map[string]func(k *Kernel, s State){
		"given up": func(k *Kernel, s State) {
			remove(t, k, State{Elements: portTo(TCP, "10.7.0.2"), Veths: s.Veths[:1]})
		},
		"leads elsewhere": func(k *Kernel, s State) { // as after a crash in between
			if err := k.firewall.remove(t.Context(), portTo(TCP, "10.7.0.2")); err != nil {
				t.Fatal(err)
			}
			remove(t, k, State{Veths: s.Veths[:1]})
			ensure(t, k, State{Elements: portTo(TCP, "10.7.0.1")}) // where nobody listens
		},
	} {
		t.Run(name, func(t *testing.T) {
			k, host, client, s := served(t)
			ensure(t, k, State{Elements: portTo(TCP, "10.7.0.2")})
			var c, idle net.Conn
			client.Do(func() {
				var err error
				if c, err = net.DialTimeout("tcp", "192.0.2.1:8080", 3*time.Second); err != nil {
					t.Fatal(err)
				}
			})
			t.Cleanup(func() { _ = c.Close() })
			l, err := net.Listen("tcp4", "192.0.2.1:9090") // the host's own go on
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			go echo(l)
			client.Do(func() {
				if idle, err = net.DialTimeout("tcp", "192.0.2.1:9090", 3*time.Second); err != nil {
					t.Fatal(err)
				}
			})
			t.Cleanup(func() { _ = idle.Close() })
			say := func(c net.Conn) error {
				_ = c.SetDeadline(time.Now().Add(2 * time.Second))
				if _, err := c.Write([]byte("x")); err != nil {
					return err
				}
				_, err := c.Read(make([]byte, 1))
				return err
			}
			for _, c := range []net.Conn{c, idle} {
				if err := say(c); err != nil {
					t.Fatal(err)
				}
			}
			after(k, s)
			k.flows.walks.Wait()
			if err := say(c); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the client is told %v, tracked:\n%s", err, host.Exec("conntrack", "-L"))
			}
			if err := say(idle); err != nil {
				t.Errorf("the host's own connection: %v", err)
			}
		})
	}
}

// TestRebuildPutsFlowsRight: what came to the held socket while the table was gone
// goes to the container once it is back, whatever brought it back.
func TestRebuildPutsFlowsRight(t *testing.T) {
	for name, again := range map[string]func(k *Kernel) error{
		"publishing another port": func(k *Kernel) error {
			_, err := k.Ensure(t.Context(), State{Elements: []Element{{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: UDP, Port: 53, To: netip.MustParseAddr("10.7.0.2"), ToPort: 53}}})
			return err
		},
		"removing a network": func(k *Kernel) error {
			return k.Remove(t.Context(), State{Elements: []Element{{Set: SetInternal, Link: "wfx"}}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			k, host, client, _ := served(t)
			ensure(t, k, State{Elements: append(portTo(UDP, "10.7.0.2"), Element{Set: SetInternal, Link: "wfx"})})
			k.flows.walks.Wait()
			host.Exec("sh", "-ec", `
				nft add table ip engine; nft add chain ip engine in '{ type filter hook prerouting priority 0; }'
				nft add rule ip engine in ct state new accept # flows are tracked without us
				nft delete table inet weft`)
			own, err := net.ListenPacket("udp4", "192.0.2.1:8080")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = own.Close() })
			go func() {
				buf := make([]byte, 10)
				for {
					_, from, err := own.ReadFrom(buf)
					if err != nil {
						return
					}
					_, _ = own.WriteTo([]byte("host"), from)
				}
			}()
			var c net.Conn
			client.Do(func() { c = dialUDP(t, "192.0.2.1:8080") })
			if a, err := ask(c, []byte("?")); err != nil || string(a) != "host" {
				t.Fatalf("without the table: %q, %v", a, err)
			}
			if err := again(k); err != nil {
				t.Fatal(err)
			}
			k.flows.walks.Wait()
			if a, err := ask(c, []byte("?")); err != nil || string(a) != "container" {
				t.Errorf("answer %q, %v", a, err)
			}
		})
	}
}

// TestFlowsCannotBeRead: a kernel that does not show its flows is said once, and is
// in nobody's way.
func TestFlowsCannotBeRead(t *testing.T) {
	k, _ := newKernel(t)
	log, hook := logtest.NewNullLogger()
	k.flows.log = log
	k.flows.track.sockets[unix.NETLINK_NETFILTER].Close()
	for range 3 {
		for _, p := range []Proto{TCP, UDP, SCTP} {
			ensure(t, k, State{Elements: portTo(p, "10.7.0.2")})
			remove(t, k, State{Elements: portTo(p, "10.7.0.2")})
		}
		k.flows.walks.Wait()
	}
	if n := len(hook.AllEntries()); n != 1 || !strings.Contains(hook.LastEntry().Message, "published again") {
		t.Errorf("said %d times: %v", n, hook.AllEntries())
	}
	k.flows.track = nil // closed already
}
