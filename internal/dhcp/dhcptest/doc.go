// Package dhcptest runs real DHCP servers for a test: dnsmasq, ISC's dhcpd and
// Kea, for IPv4 or IPv6.
//
// It owns their processes, configuration and lease files for the length of one
// test; a killed test binary leaves no process behind. A server plays the router
// in a network namespace whose links and addresses are the test's. It is never
// imported outside tests.
//
// Where a server is not installed (Debian: dnsmasq-base, isc-dhcp-server,
// kea-dhcp4-server, kea-dhcp6-server) a test is skipped, visibly; with
// REQUIRE_NETNS=1 in the environment it fails instead.
//
// Start with [Start]; [Server.Leases] is what the server itself holds for true.
package dhcptest
