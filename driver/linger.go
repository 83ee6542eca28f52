package driver

import (
	"context"
	"maps"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

// lingerTime is how long a sub-interface may need to go with its namespace.
const lingerTime = time.Minute

// linger notes the hardware address of a macvlan that is deleted while it is not on
// the host: the container's namespace goes away with it, or the engine moves it
// back later. Until then no other one with that address can be set up, and the next
// container often has it, as it has the address.
func (d *Driver) linger(n *network, id string) {
	e := d.lock(n, id)
	if e == nil {
		return
	}
	defer e.mu.Unlock()
	link, mac := d.macvlan(n, e.rec)
	if link == "" {
		return
	}
	if there, err := d.lan.Present(link); err != nil || there {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	maps.DeleteFunc(d.lingers, func(_ datapath.MAC, t time.Time) bool { return now.Sub(t) > lingerTime })
	if d.lingers == nil {
		d.lingers = map[datapath.MAC]time.Time{}
	}
	d.lingers[mac] = now
}

// await waits for what linger noted.
func (d *Driver) await(ctx context.Context, n *network, rec Endpoint) error {
	link, mac := d.macvlan(n, rec)
	d.mu.Lock()
	t, ok := d.lingers[mac]
	d.mu.Unlock()
	if link == "" || !ok || d.now().Sub(t) > lingerTime {
		return nil
	}
	if err := d.lan.Settle(ctx, link); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.lingers, mac)
	return nil
}

// macvlan is the endpoint's sub-interface with a hardware address of its own, ""
// where it has none.
func (d *Driver) macvlan(n *network, rec Endpoint) (link string, mac datapath.MAC) {
	if !n.rec.onParent() {
		return "", mac
	}
	for _, c := range d.backends[n.rec.Mode].Endpoint(n.rec, rec).Children {
		if c.MAC != (datapath.MAC{}) {
			return c.Name, c.MAC
		}
	}
	return "", mac
}
