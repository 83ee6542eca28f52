// Package netnstest gives a test network namespaces of its own.
//
// It owns namespaces for the length of one test: they have no name, are held
// by a file descriptor only, and so are gone with the test however it ends,
// a killed test binary included. It never touches the namespace that the test
// binary was started in, and is never imported outside tests.
//
// Network namespaces belong to threads. [Enter] and [NS.Do] therefore lock the
// calling goroutine to its thread and switch that thread; functions run on the
// caller's goroutine, so t.Fatal works inside them. Goroutines that the test
// starts do not inherit the namespace, and neither do subtests: they call
// Enter or Do themselves. A thread that cannot be switched back is never
// unlocked; the runtime destroys it when its goroutine ends.
//
// Start with [Run] (or Enter, for benchmarks) for the "host" and [New] for
// each "container"; [NS.Take] moves a link into a container as the engine
// does.
//
// Without the privilege to make a namespace a test is skipped, visibly; with
// REQUIRE_NETNS=1 in the environment it fails instead. [Needs] does the same for
// kinds of links that a kernel may lack, with REQUIRE_KERNEL=1.
package netnstest
