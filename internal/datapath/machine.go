package datapath

import (
	"io/fs"
	"os"
	"slices"
	"strings"
)

// noUUIDs are what boards have whose maker gave them none.
var noUUIDs = []string{"03000200-0400-0500-0006-000700080009", "12345678-1234-5678-90ab-cddeefaabbcc"}

// Machine is by what this machine differs from its clones: the UUID that the
// firmware or the hypervisor gives it, "uuid …", and the hardware addresses of its
// network cards, "mac …". A copy of the disk shares neither. /etc/machine-id, which
// copies share, is not among them, and a managed plugin does not see it. Nothing is
// returned where neither is there, as in a container without devices.
func Machine() []string { return machine(os.DirFS("/sys")) }

func machine(sys fs.FS) (facts []string) {
	read := func(name string) string {
		b, err := fs.ReadFile(sys, name)
		if err != nil {
			return "" // not every machine has it
		}
		return strings.ToLower(strings.TrimSpace(string(b)))
	}
	uuid := read("class/dmi/id/product_uuid")
	if len(uuid) == 36 && !slices.Contains(noUUIDs, uuid) && len(strings.Trim(strings.ReplaceAll(uuid, "-", ""), uuid[:1])) > 0 {
		facts = append(facts, "uuid "+uuid)
	}
	cards, _ := fs.Glob(sys, "class/net/*") // the pattern is a good one
	for _, card := range cards {
		// Virtual devices are nothing of the machine's, and an address that somebody
		// set, a bond for instance, may be another card's.
		if _, err := fs.Stat(sys, card+"/device"); err != nil || read(card+"/addr_assign_type") != "0" {
			continue
		}
		if mac := read(card + "/address"); mac != "" && strings.Trim(mac, "0:") != "" {
			facts = append(facts, "mac "+mac)
		}
	}
	slices.Sort(facts)
	return slices.Compact(facts)
}
