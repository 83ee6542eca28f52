package driver

import (
	"context"
	"time"
)

const (
	// announceTimes and announceInterval are the engine's, from version 28 on.
	// It announces for remote drivers too, but IPv4 as 0.0.0.0.
	announceTimes    = 3
	announceInterval = time.Second
	// mostNews is how many endpoints may wait to be announced; more than that
	// join at once only on a host with greater worries.
	mostNews = 1024
)

// news is an endpoint that others have to hear of.
type news struct {
	network, endpoint string
	link              string // on which they are
	left              int
	at                time.Time
}

// tell lets Announce know of an endpoint that was just joined. Those on a LAN are
// announced several times, since its stations may be asleep or far away; those on a
// bridge of ours once, before the engine has moved their interface: a later
// advertisement would reach the container itself, whose kernel complains that
// somebody else has its address.
func (d *Driver) tell(n *network, e *endpoint) {
	x := news{network: n.rec.ID, endpoint: e.rec.ID, link: n.rec.onLAN(), left: announceTimes}
	if x.link == "" {
		v, ok := veth(d.backends[n.rec.Mode].Endpoint(n.rec, e.rec), hostEnd(e.rec.ID))
		if !ok {
			return
		}
		x.link, x.left = v.Master, 1
	}
	select {
	case d.news <- x:
	default:
	}
}

// Announce tells the neighbours of endpoints that were joined, until ctx ends:
// they may remember another station under the address.
func (d *Driver) Announce(ctx context.Context) error {
	var queue []news // in the order of their time
	for {
		var due <-chan time.Time
		if len(queue) > 0 {
			due = time.After(time.Until(queue[0].at))
		}
		select {
		case <-ctx.Done():
			return nil
		case x := <-d.news:
			queue = append([]news{x}, queue...) // its time is the zero one
		case <-due:
			x := queue[0]
			queue = queue[1:]
			d.announce(x)
			if x.left--; x.left > 0 {
				x.at = time.Now().Add(announceInterval)
				queue = append(queue, x)
			}
		}
	}
}

// announce tells the neighbours once, if the endpoint is still there.
func (d *Driver) announce(x news) {
	d.mu.Lock()
	n := d.networks[x.network]
	if n == nil || n.doomed {
		d.mu.Unlock()
		return
	}
	e := n.endpoints[x.endpoint]
	if e == nil || !e.holds() {
		d.mu.Unlock()
		return
	}
	rec := e.rec
	d.mu.Unlock()
	for _, a := range rec.Addrs {
		if err := d.lan.Announce(x.link, a.Addr(), rec.MAC); err != nil {
			d.log.WithField("network", x.network).WithError(err).Debug("an address was not announced")
		}
	}
}
