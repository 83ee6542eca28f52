package datapath

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// What the kernel sends is parsed without a library; whatever the bytes, it
// must not read beyond them.
func FuzzParseLink(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 16))
	f.Add(append(make([]byte, 16), 8, 0, 3, 0, 'l', 'o', 0, 0, 8, 0, 4, 0, 1, 2, 3, 4))
	f.Add(append(make([]byte, 16), 12, 0, 18, 0, 9, 0, 1, 0, 'v', 'e', 't', 'h'))
	f.Add(append(make([]byte, 16), 6, 0, 4, 0, 1, 2))
	f.Add(append(make([]byte, 16), 0, 0, 3, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLink(b)
		if err == nil && len(l.name)+len(l.kind) > len(b) {
			t.Errorf("name %q and kind %q out of %d bytes", l.name, l.kind, len(b))
		}
	})
}

func FuzzParseNeigh(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 12))
	f.Add(append(make([]byte, 12), 10, 0, 2, 0, 2, 0, 0, 0, 0, 1, 0, 0, 8, 0, 1, 0, 192, 0, 2, 1))
	f.Add(append(make([]byte, 12), 5, 0, 1, 0, 1, 0, 0, 0, 0, 0, 2, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseNeigh(b)
		if err == nil && n.dst.IsValid() && len(b) < 12+4+n.dst.BitLen()/8 {
			t.Errorf("address %s out of %d bytes", n.dst, len(b))
		}
	})
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add("nameserver 1.1.1.1\n# x\nnameserver ::1%lo\noptions edns0")
	f.Fuzz(func(t *testing.T, s string) {
		list, err := parseResolvConf(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, p := range list {
			if !p.IsValid() || p != p.Masked() || p.Addr().Zone() != "" || p.Addr().Is4In6() {
				t.Errorf("%q gives %s", s, p)
			}
		}
	})
}

func TestParseResolvConf(t *testing.T) {
	got, err := parseResolvConf(strings.NewReader("; c\nnameserver\t10.0.0.53 # no\n nameserver ::ffff:10.0.0.54\nNAMESERVER 1.1.1.1\nnameserver\nnameserver 10.0.0.0/8\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Prefix{prefix("10.0.0.53/32"), prefix("10.0.0.54/32")}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); d != "" {
		t.Errorf("name servers (-want +got):\n%s", d)
	}
}
