#!/usr/bin/env bash
# Installs the Debian packages that the tests need, those that are missing.
set -euo pipefail
need=(gcc libc6-dev docker.io docker-compose iptables nftables iproute2 busybox-static conntrack
	tcpdump debootstrap procps kmod cpio qemu-system-x86 ca-certificates etcd-server curl
	dnsmasq-base isc-dhcp-server kea-dhcp4-server kea-dhcp6-server firewalld)
missing=()
for p in "${need[@]}"; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "installing: ${missing[*]}"
# Engine, etcd, firewalld and the DHCP servers are started by the tests themselves: keep the packages from starting them.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod +x $policy
	trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${missing[@]}"
# The packages of these have them start at the next boot.
declare -A service=([etcd-server]=etcd [firewalld]=firewalld [isc-dhcp-server]=isc-dhcp-server
	[kea-dhcp4-server]=kea-dhcp4-server [kea-dhcp6-server]=kea-dhcp6-server)
for p in "${missing[@]}"; do
	if [[ -n ${service[$p]:-} && -d /run/systemd/system ]]; then
		systemctl disable -q "${service[$p]}"
	fi
done
