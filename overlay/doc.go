// Package overlay joins the networks of several hosts: -o mode=overlay.
//
// It owns what hosts tell each other. What one host has of one network is a
// [Part]: its address on the underlay and its endpoints. A Part has one writer,
// the host that it is about, carries a version that only grows, and is always
// exchanged whole. So no loss, repetition or order of arrival can leave a
// mixture, and there is nothing to be deleted that could come back.
//
// [Table] holds the parts of all hosts for the networks that this one has, and
// works out what they mean together: which address is where, who wins where two
// hosts claim one. It does no I/O. An [Engine] carries parts between hosts:
// [Gossip] between peers alone, [Etcd] through a store that they share.
// [Backend] says what a network is in the kernel, and [Cluster] ties these to
// the network driver.
//
// It never touches the kernel: the driver asks for what leads to other hosts
// and makes the kernel equal to it, on the same path as everything else. And it
// never takes a silent host for a dead one: the containers there go on working
// without their plugin, so what leads to them stays for the grace time.
//
// Locking: Table has one mutex and calls nothing while it holds it. Etcd has one
// that it holds while it calls the Table, never while it waits for the store. What is
// known of the tunnels has its own, and nothing is called while that is held.
package overlay
