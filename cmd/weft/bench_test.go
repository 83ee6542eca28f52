package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// BenchmarkRestart kills a plugin that has 1,000 endpoints and starts it
// again, until it answers a call; at most 1 s is promised.
func BenchmarkRestart(b *testing.B) {
	const endpoints = 1000
	dir := b.TempDir()
	// Something that keeps the network namespace while the plugin is dead.
	holder := exec.Command("sleep", "600")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := holder.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	})
	begin := func() *process {
		b.Helper()
		cmd := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", holder.Process.Pid),
			os.Args[0], "serve", "--socket", dir+"/p.sock", "--state", dir)
		cmd.Env = append(os.Environ(), asMain+"=1", "LOG_LEVEL=error")
		return startCmd(b, dir, cmd)
	}
	p := begin()
	p.must(b, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{}},`+
		`"IPv4Data":[{"AddressSpace":"l","Pool":"10.99.0.0/16","Gateway":"10.99.0.1/16"}],"IPv6Data":[]}`)
	id := func(i int) string { return fmt.Sprintf("%012x", i) + strings.Repeat("e", 52) }
	for i := range endpoints {
		p.must(b, "NetworkDriver.CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":"10.99.%d.%d/16"},"Options":{}}`,
			netID, id(i), 1+i/250, 1+i%250))
		p.must(b, "NetworkDriver.Join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/x","Options":{}}`, netID, id(i)))
	}
	b.ResetTimer()
	for b.Loop() {
		b.StopTimer()
		if err := p.Process.Kill(); err != nil {
			b.Fatal(err)
		}
		<-p.ended
		b.StartTimer()
		p = begin()
		p.must(b, "NetworkDriver.EndpointOperInfo", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, id(1)))
	}
	b.StopTimer()
	d := p.status(b)
	if d.Phase != serving || len(d.Endpoints) != endpoints {
		b.Errorf("after the restart: %s %s, %d endpoints", d.Phase, d.Error, len(d.Endpoints))
	}
	for _, e := range d.Endpoints {
		if e.State != "up" {
			b.Fatalf("endpoint %s is %s", e.ID, e.State)
		}
	}
	if perStart := b.Elapsed() / time.Duration(b.N); perStart > time.Second {
		b.Errorf("a restart takes %v", perStart)
	}
}
