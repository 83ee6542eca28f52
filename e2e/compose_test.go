//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// standIns are the images that the examples name, made of the probe: no
// registry can be reached here, and the probe answers on the same ports.
var standIns = map[string]string{
	"nginx:alpine": `CMD ["/probe","serve","tcp:80"]`,
	"redis:alpine": `CMD ["/probe","serve","tcp:6379"]`,

	"pihole/pihole:latest":                         `CMD ["/probe","serve","tcp:80","tcp:53","udp:53"]`,
	"ghcr.io/home-assistant/home-assistant:stable": `CMD ["/probe","serve","tcp:8123"]`,
	"plexinc/pms-docker:latest":                    `CMD ["/probe","serve","tcp:32400"]`,
}

// example is what is asked of one file of examples/.
type example struct {
	before func(w *world) // what the host has to have
	probes []probe
}

func exampleTable() map[string]example {
	return map[string]example{
		"compose.yaml": {probes: []probe{
			{name: "from outside", ask: dial("client", "tcp", "host:8080", "-wait", "5s"), want: "web sees client"},
			{name: "to the cache by name", ask: dial("web", "tcp", "name/cache:6379"), want: "cache sees web@back"},
			{name: "web to outside", ask: dial("web", "tcp", "client:7000"), want: "client sees host"},
			{name: "cache to outside", ask: dial("cache", "tcp", "client:7000"), want: "unreachable"},
		}},
		"addresses.yaml": {probes: []probe{
			{name: "from outside", ask: dial("client", "tcp", "host:8080", "-wait", "5s"), want: "web sees client"},
			{name: "from outside, IPv6", ask: dial("client", "tcp", "host6:8080"), want: "web sees client"},
			{name: "addresses", ask: fact("web", func(_ *world, ifs []iface) string { return strings.Join(ifs[0].Addrs, " ") }), want: "10.42.0.10/24 fd42::10/64"},
			{name: "interface", ask: fact("web", interfaceFacts), want: "eth0 mtu 1400 up"},
			{name: "bridge", ask: func(w *world) string { return strings.Fields(w.e.net(w, "ip", "-br", "link", "show", "lab0"))[0] }, want: "lab0"},
		}},
		"dhcp.yaml": {
			before: func(w *world) { w.e.lan.dhcpHost(w) },
			probes: []probe{
				{name: "from the LAN", ask: dial("client", "tcp", "web:80", "-wait", "5s"), want: "web sees client"},
				{name: "to the LAN", ask: dial("web", "tcp", "client:7000"), want: "client sees web"},
				{name: "from the host", ask: dial("host", "tcp", "web:80"), want: "web sees host"},
				{name: "published, from the LAN", ask: answered("client", "host:8080"), want: "web"},
			},
		},
		"reservations.yaml": {probes: []probe{
			{name: "to what has a reservation", ask: dial("web", "tcp", "name/db:6379", "-wait", "5s"), want: "db sees web"},
			{name: "its address", ask: fact("db", func(_ *world, ifs []iface) string { return ifs[0].Addrs[0] + " " + ifs[0].MAC }), want: "10.45.0.20/24 02:00:0a:2d:00:14"},
		}},
		"existing-bridge.yaml": {
			before: func(w *world) {
				w.e.net(w, "ip", "link", "add", "br0", "type", "bridge")
				w.e.net(w, "ip", "addr", "add", "10.43.0.1/24", "dev", "br0")
				w.e.net(w, "ip", "link", "set", "br0", "up")
			},
			probes: []probe{
				{name: "from the host", ask: dial("host", "tcp", "web:80", "-wait", "5s"), want: "web sees 10.43.0.1"},
			},
		},
		"lan.yaml": {
			before: homeLAN,
			probes: []probe{
				{name: "from the LAN", ask: dial("client", "tcp", "dns:80", "-wait", "5s"), want: "dns sees router"},
				{name: "to the LAN", ask: dial("web", "tcp", "router:7000"), want: "client sees web"},
				{name: "address", ask: fact("dns", func(_ *world, ifs []iface) string { return ifs[0].Addrs[0] }), want: "192.168.1.200/24"},
				{name: "from the host", ask: dial("host", "tcp", "web:80"), want: "web sees lan.host"},
				{name: "by name", ask: dial("web", "tcp", "name/dns:80"), want: "dns sees web"},
				{name: "from a bridge", ask: answered("cache", "web:80"), want: "web"},
				{name: "published, from the LAN", ask: answered("client", "lan.host:8080"), want: "web"},
			},
		},
		"home-lab.yaml": {
			before: homeLAN,
			probes: []probe{
				{name: "DNS, from the LAN", ask: dial("client", "udp", "pihole:53", "-wait", "5s"), want: "pihole sees router"},
				{name: "DNS, from the host", ask: dial("host", "udp", "pihole:53"), want: "pihole sees lan.host"},
				{name: "addresses", ask: func(w *world) string {
					return strings.Join([]string{w.address["pihole"], w.address["homeassistant"], w.address["plex"]}, " ")
				}, want: "192.168.1.201 192.168.1.202 192.168.1.203"},
				{name: "Home Assistant to the LAN", ask: dial("homeassistant", "tcp", "router:7000"), want: "client sees homeassistant"},
				{name: "Plex, from the LAN", ask: dial("client", "tcp", "plex:32400"), want: "plex sees router"},
			},
		},
		"routed.yaml": {probes: []probe{
			{name: "from outside at its own address", ask: dial("client", "tcp", "web:80", "-wait", "5s"), want: "web sees client"},
			{name: "to outside", ask: dial("web", "tcp", "client:7000"), want: "client sees web"},
		}},
		"isolated-tenants.yaml": {probes: []probe{
			{name: "from outside", ask: dial("client", "tcp", "host:8081", "-wait", "5s"), want: "one sees client"},
			{name: "from outside, host only", ask: dial("client", "tcp", "host:8082"), want: "refused"},
			{name: "from the host", ask: dial("host", "tcp", "lo:8082"), want: "two sees gateway"},
			{name: "one to the other", ask: dial("one", "tcp", "two:80"), want: "timeout"},
		}},
	}
}

// answered is who answers, where the client is seen by the address that the
// host's own sub-interface has chosen.
func answered(from, to string) func(*world) string {
	return func(w *world) string {
		who, _, _ := strings.Cut(w.dialFrom(from, "tcp", to), " sees ")
		return who
	}
}

// homeLAN gives the host an address on a LAN as at home, with the client as its router.
func homeLAN(w *world) {
	w.e.net(w, "ip", "addr", "replace", "192.168.1.10/24", "dev", "lan0")
	w.e.lan.client.net(w, "ip", "addr", "replace", "192.168.1.1/24", "dev", "lan0")
	w.learn("lan.host", "192.168.1.10")
	w.learn("router", "192.168.1.1")
}

// TestExamples runs every file of examples/ with Compose.
func TestExamples(t *testing.T) {
	t.Parallel()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.lan.client.serve(t, "tcp:7000")
	for name, cmd := range standIns {
		e.must(t, "import", "--change", cmd, suite.image, name)
	}
	files, err := filepath.Glob("../examples/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	table := exampleTable()
	for _, f := range files {
		if filepath.Base(f) == "cluster" {
			continue // those need several hosts: TestClusterExamples
		}
		x, ok := table[filepath.Base(f)]
		if !ok {
			t.Errorf("%s is not tested", f)
			continue
		}
		t.Run(filepath.Base(f), func(t *testing.T) { e.runExample(t, f, x) })
	}
}

func (e *engine) runExample(t *testing.T, file string, x example) {
	t.Helper()
	w := newWorld(t, e, ours)
	if x.before != nil {
		x.before(w)
	}
	if err := e.compose(nil, file, "example", "up", "-d"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.compose(nil, file, "example", "down"); err != nil {
			t.Error(err)
		}
		e.checkClean(t)
	}()
	w.lookCompose()
	for _, p := range x.probes {
		if got := p.ask(w); got != p.want {
			t.Errorf("%s: %q, want %q", p.name, got, p.want)
		}
	}
}

// lookCompose knows the containers by their services' names.
func (w *world) lookCompose() {
	w.Helper()
	for id := range strings.FieldsSeq(w.e.must(w, "ps", "-q")) {
		service := w.e.must(w, "inspect", "-f", `{{index .Config.Labels "com.docker.compose.service"}}`, id)
		w.pids[service] = w.e.must(w, "inspect", "-f", "{{.State.Pid}}", id)
		// The probe says its host name, which Compose leaves to the engine.
		host := w.e.must(w, "inspect", "-f", "{{.Config.Hostname}}", id)
		w.names[host] = service
		nets := w.e.must(w, "inspect", "-f", `{{range $n, $x := .NetworkSettings.Networks}}{{$n}} {{$x.IPAddress}} {{$x.Gateway}}{{"\n"}}{{end}}`, id)
		lines := strings.Split(nets, "\n")
		for _, l := range lines {
			f := strings.Fields(l)
			symbol := service
			if len(lines) > 1 {
				_, net, _ := strings.Cut(f[0], "_")
				symbol += "@" + net
			}
			w.learn(symbol, f[1])
			if len(f) > 2 && w.symbol[f[2]] == "" && f[2] != "10.43.0.1" {
				w.learn("gateway", f[2])
			}
		}
	}
}

// compose runs docker-compose against this engine.
func (e *engine) compose(env []string, file, project string, args ...string) error {
	name, err := exec.LookPath("docker-compose")
	if err != nil {
		return err
	}
	c := exec.Command(name, append([]string{"-f", file, "-p", project}, args...)...)
	c.Env = append(os.Environ(), "DOCKER_HOST=unix://"+e.socket(), "DOCKER_CONFIG="+e.dir, "COMPOSE_HTTP_TIMEOUT=120", "PARENT=lan0")
	c.Env = append(c.Env, env...)
	_, err = output(c)
	return err
}
