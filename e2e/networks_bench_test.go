//go:build e2e

package e2e

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkManyNetworks starts a container that is on twenty networks, as a Compose
// project with many has them: on networks of the built-in bridge and of ours, in turn.
func BenchmarkManyNetworks(b *testing.B) {
	const networks, rounds = 20, 3
	e := newEngine(b, nil)
	e.installPlugin(b, "LOG_LEVEL=info") // as people have it
	for i := range networks {
		e.must(b, "network", "create", "-d", builtin, "--subnet", fmt.Sprintf("10.201.%d.0/24", i), fmt.Sprintf("theirs%d", i))
		e.oursNetwork(b, fmt.Sprintf("ours%d", i), "--subnet", fmt.Sprintf("10.202.%d.0/24", i))
	}
	took := map[string][]time.Duration{}
	for b.Loop() {
		for r := range rounds {
			for _, of := range []string{"theirs", "ours"} {
				name := fmt.Sprintf("%s-%d", of, r)
				e.must(b, "create", "--name", name, "--network", of+"0", image)
				for i := 1; i < networks; i++ {
					if err := post(e.socket(), fmt.Sprintf("/networks/%s%d/connect", of, i), fmt.Sprintf(`{"Container":%q}`, name)); err != nil {
						b.Fatal(err)
					}
				}
				begin := time.Now()
				if err := post(e.socket(), "/containers/"+name+"/start", ""); err != nil {
					b.Fatal(err)
				}
				took[of] = append(took[of], time.Since(begin))
				e.must(b, "rm", "-f", name)
			}
		}
	}
	for _, of := range []string{"theirs", "ours"} {
		note("%s: start with %d networks, %s: %v", b.Name(), networks, of, took[of])
		b.ReportMetric(float64(median(took[of]).Milliseconds()), of+"-ms")
	}
	b.ReportMetric(median(took["ours"]).Seconds()/median(took["theirs"]).Seconds(), "ours/builtin")
	b.ReportMetric(0, "ns/op")
	for i := range networks {
		e.must(b, "network", "rm", fmt.Sprintf("theirs%d", i), fmt.Sprintf("ours%d", i))
	}
	e.checkClean(b)
}
