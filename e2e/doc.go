// Package e2e runs weft as users run it: a real engine, the managed plugin
// created and enabled in it, containers, and a client on another machine.
//
// Owns: machines made of namespaces (machine_test.go), engines in them
// (engine_test.go), the parity tables against the built-in drivers
// (parity_test.go, *table_test.go, lan_kinds_test.go), networks on a LAN
// (lan_*.go), addresses that stay or are leased (lease_*.go), networks across
// hosts (overlay_*.go), faults, Compose files of
// examples/ and the benchmarks that need an engine.
//
// Never: imports the code under test. It knows the plugin by its bundle
// (build/plugin), its driver name and the output of "weft status --json".
//
// A machine is one process with a network, mount, host name and process
// namespace of its own; when that process ends, for whatever reason, the
// kernel ends everything that ran in them and removes every link. So a test
// that is killed leaves nothing but a directory.
//
// All files but this one carry the build tag e2e: they need root and an
// engine. Settings: ENGINE=20 (docker.io of this machine, the default) or 28
// (Debian sid, bootstrapped once into WEFT_CACHE, default
// ${XDG_CACHE_HOME:-/var/cache}/weft/engine-28); E2E_PROBE=FILE is the probe's
// binary, else it is built; E2E_SLOW=N multiplies the limits of time, for
// emulated processors; E2E_LOGS=DIR keeps the daemon logs of failed
// tests; WEFT_SOAK=1 makes faults of clusters last as long as real ones do;
// REQUIRE_KERNEL=1 makes tests fail that are otherwise skipped because the kernel
// lacks what they are about.
package e2e
