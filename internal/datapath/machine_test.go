package datapath

import (
	"slices"
	"testing"
	"testing/fstest"
)

func TestMachine(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text + "\n")} }
	card := func(sys fstest.MapFS, name, mac, kind string, device bool) {
		sys["class/net/"+name+"/address"], sys["class/net/"+name+"/addr_assign_type"] = file(mac), file(kind)
		if device {
			sys["class/net/"+name+"/device/vendor"] = file("0x1af4")
		}
	}
	sys := fstest.MapFS{"class/dmi/id/product_uuid": file("4C4C4544-0042-3010-8052-B4C04F4D3432")}
	card(sys, "eth0", "02:FC:00:00:00:01", "0", true)
	card(sys, "eth1", "02:fc:00:00:00:01", "3", true) // of a bond: set
	card(sys, "usb0", "0a:00:00:00:00:01", "1", true) // random at each boot
	card(sys, "br0", "02:fc:00:00:00:02", "0", false)
	card(sys, "lo", "00:00:00:00:00:00", "0", false)
	if got, want := machine(sys), []string{"mac 02:fc:00:00:00:01", "uuid 4c4c4544-0042-3010-8052-b4c04f4d3432"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for _, none := range []string{"", "03000200-0400-0500-0006-000700080009", "00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "Not Settable"} {
		if got := machine(fstest.MapFS{"class/dmi/id/product_uuid": file(none)}); got != nil {
			t.Errorf("uuid %q: %q, want none", none, got)
		}
	}
	if got := machine(fstest.MapFS{}); got != nil {
		t.Errorf("without sysfs: %q", got)
	}
}
