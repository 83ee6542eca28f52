package main

import (
	"context"
	"flag"
	"fmt"
	"path/filepath"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/internal/plugin"
)

const (
	// Of the default instance; those of others have "-" and its name in them.
	defaultState  = "/var/lib/weft"
	defaultSocket = "/run/docker/plugins/weft.sock"
	adminSocket   = "admin.sock" // inside the state's directory
)

// serve is the plugin's process. It returns when ctx ends, or before it has
// begun to listen.
func (p program) serve(ctx context.Context, args []string) error {
	var s settings
	fs := flag.NewFlagSet("weft serve", flag.ContinueOnError)
	fs.StringVar(&s.logLevel, "log-level", p.env("LOG_LEVEL"), "panic, fatal, error, warn, info, debug or trace (LOG_LEVEL; default info)")
	fs.StringVar(&s.pools, "pools", p.env("POOLS"), "where automatic subnets come from: cidr:size,... (POOLS; default: private ranges that the host does not use)")
	fs.StringVar(&s.scope, "scope", p.env("SCOPE"), "local, or global for networks of a whole swarm (SCOPE; default local)")
	fs.StringVar(&s.instance, "instance", p.env("INSTANCE"), "what keeps two wefts on one host apart (INSTANCE; default local or global, by SCOPE)")
	fs.StringVar(&s.peers, "peers", p.env("PEERS"), "other hosts of the cluster: host[:port],... (PEERS)")
	fs.StringVar(&s.underlay, "underlay", p.env("UNDERLAY"), "interface or address that carries traffic between hosts (UNDERLAY; default: the one that leads to PEERS, else that of the default route)")
	fs.StringVar(&s.grace, "grace", p.env("GRACE"), "how long what leads to a silent host stays (GRACE; default 10m)")
	fs.StringVar(&s.history, "history", p.env("HISTORY"), "how long weft address history knows who had an address; 0: not at all (HISTORY; default 720h)")
	fs.StringVar(&s.gossipPort, "gossip-port", p.env("GOSSIP_PORT"), "port, TCP and UDP, on which hosts tell each other what they have (GOSSIP_PORT; default 7947, with SCOPE=global 7948)")
	fs.StringVar(&s.guard, "forward-guard", p.env("FORWARD_GUARD"), "off: where weft switches forwarding on, the host forwards for others than containers too (FORWARD_GUARD; default on)")
	fs.StringVar(&s.store.Endpoints, "store", p.env("STORE"), "etcd://host:2379,... puts what hosts share into etcd, etcds:// with TLS (STORE; default: files of this host, and PEERS)")
	fs.StringVar(&s.store.CA, "store-ca", p.env("STORE_CA"), "file with the certificates that etcd's is checked against (STORE_CA)")
	fs.StringVar(&s.store.Cert, "store-cert", p.env("STORE_CERT"), "file with this host's certificate for etcd (STORE_CERT)")
	fs.StringVar(&s.store.Key, "store-key", p.env("STORE_KEY"), "file with its key (STORE_KEY)")
	fs.StringVar(&s.store.User, "store-user", p.env("STORE_USER"), "user of etcd (STORE_USER)")
	s.store.Password = p.env("STORE_PASSWORD")
	s.secret = p.env("SECRET") // no flag: everybody on the host can read a command line
	fs.StringVar(&s.state, "state", "", "directory of the databases and of the socket for weft status (default "+defaultState+", or "+defaultState+"-INSTANCE)")
	fs.StringVar(&s.socket, "socket", "", "socket on which the engine finds the plugin (default "+defaultSocket+", or .../weft-INSTANCE.sock)")
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) > 0 {
		return p.wrong("serve takes no argument %q", words[0])
	}
	s.complete()
	log := p.logger(s.logLevel)
	if err := s.checkLogLevel(); err != nil {
		log.Errorf("setting LOG_LEVEL=%.60q: %v; going on with info", s.logLevel, err)
	}
	if p.drop != nil {
		if err := p.drop(); err != nil {
			log.WithError(err).Warn("going on with more privileges than needed")
		}
	}
	l, err := plugin.Listen(s.socket)
	if err != nil {
		return err
	}
	log.WithFields(logrus.Fields{"version": version, "instance": s.instance, "socket": s.socket, "state": s.state}).Info("listening")

	d := newDaemon(s, log)
	defer d.close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.mux.Serve(ctx, l) })
	g.Go(func() error { d.serveAdmin(ctx); return nil })
	g.Go(func() error { d.run(ctx); return nil })
	err = g.Wait()
	log.Info("stopped")
	return err
}

// logger writes to the standard output, which the engine takes for
// information; it would log every line on the other one as an error.
func (p program) logger(level string) *logrus.Logger {
	log := logrus.New()
	log.SetOutput(p.out)
	log.SetFormatter(&logrus.TextFormatter{DisableColors: true, FullTimestamp: true})
	if l, err := logrus.ParseLevel(level); err == nil { // see settings.checkLogLevel
		log.SetLevel(l)
	}
	return log
}

// serveAdmin answers the other commands. Networks work without it, so an error is
// only logged.
func (d *daemon) serveAdmin(ctx context.Context) {
	path := filepath.Join(d.settings.state, adminSocket)
	l, err := plugin.Listen(path)
	if err == nil {
		err = admin.Serve(ctx, l, map[string]admin.Call{admin.PathStatus: d.status, admin.PathSecret: d.secret, admin.PathNewID: d.newID, admin.PathAddress: d.address, admin.PathHistory: d.history, admin.PathNetwork: d.network}, d.log)
	}
	if err != nil {
		d.log.WithError(fmt.Errorf("serve status: %w", err)).Error("weft status will not work")
	}
}
