#!/usr/bin/env bash
# Builds the plugin's bundle, config.json and rootfs/, in OUT for ARCH:
# hack/plugin.sh OUT ARCH BINARY. Needs Debian's apt-get and dpkg, no engine,
# no registry, no root.
set -euo pipefail
out=$1 arch=$2 binary=$3
cd "$(dirname "$0")/.."

case $arch in
amd64) triplet=x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 ;;
arm64) triplet=aarch64-linux-gnu loader=lib/ld-linux-aarch64.so.1 ;;
*) echo "no iptables known for architecture $arch; build with the Dockerfile" >&2; exit 1 ;;
esac
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "this is not Debian: build with the Dockerfile" >&2; exit 1; }

# The iptables variants and what they link with. Downloaded rather than taken
# from the machine, so that every architecture is built in the same way.
packages=(iptables libxtables12 libmnl0 libnftnl11 libip4tc2 libip6tc2 libnetfilter-conntrack3 libnfnetlink0 libc6)
cache=$PWD/build/cache/$arch
if [ "$(cat "$cache/done" 2>/dev/null)" != "${packages[*]}" ]; then
	echo "downloading iptables for $arch"
	rm -rf "$cache"
	mkdir -p "$cache"/{state/lists/partial,cache/archives/partial,debs,root}
	touch "$cache/state/status"
	apt=(apt-get -q -o "Dir::State=$cache/state" -o "Dir::State::status=$cache/state/status" -o "Dir::Cache=$cache/cache"
		-o "APT::Architecture=$arch" -o "APT::Architectures=$arch" -o APT::Sandbox::User= -o APT::Get::List-Cleanup=false)
	"${apt[@]}" update >"$cache/log" 2>&1 || { cat "$cache/log" >&2; exit 1; }
	(cd "$cache/debs" && "${apt[@]}" download "${packages[@]}") >>"$cache/log" 2>&1 || { cat "$cache/log" >&2; exit 1; }
	for deb in "$cache"/debs/*.deb; do dpkg-deb -x "$deb" "$cache/root"; done
	rm -rf "$cache/state" "$cache/cache"
	echo "${packages[*]}" >"$cache/done"
fi

rm -rf "$out"
mkdir -p "$out"/rootfs/{usr/sbin,usr/lib/"$triplet"/xtables,"${loader%/*}",run/docker/plugins,var/lib/weft,tmp}
root=$out/rootfs
cp "$binary" "$root/weft"
from=$cache/root

# find_one prints the file of that name, wherever this release keeps it.
find_one() { find "$from" -path "*/$1" -print -quit | grep . || { echo "no $1 in ${packages[*]}" >&2; exit 1; }; }

for f in xtables-nft-multi xtables-legacy-multi; do cp "$(find_one "sbin/$f")" "$root/usr/sbin/"; done
for v in nft legacy; do
	ln -s "xtables-$v-multi" "$root/usr/sbin/iptables-$v"
	ln -s "xtables-$v-multi" "$root/usr/sbin/ip6tables-$v"
done
# All extensions, not only those of our own rule: listing a chain of somebody
# else fails at the first rule whose extension is missing.
cp -P "$(dirname "$(find_one xtables/libxt_mark.so)")"/lib*.so "$root/usr/lib/$triplet/xtables/"
for f in libxtables.so.12 libmnl.so.0 libnftnl.so.11 libip4tc.so.2 libip6tc.so.2 libnetfilter_conntrack.so.3 libnfnetlink.so.0 libc.so.6 libm.so.6; do
	cp -L "$(find_one "$triplet/$f")" "$root/usr/lib/$triplet/$f"
done
cp -L "$(find_one "${loader##*/}")" "$root/$loader"
cp plugin.json "$out/config.json"

# What cannot run in the rootfs alone is found here and not in production. In
# a network namespace, because iptables-legacy makes its tables when asked.
if [ "$arch" = "$(dpkg --print-architecture)" ] && [ "$(id -u)" = 0 ]; then
	for v in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
		for m in mark comment conntrack addrtype connlabel statistic; do # of each set of libraries one
			unshare -n chroot "$root" "/usr/sbin/$v" -m $m -h >/dev/null
		done
	done
	chroot "$root" /weft version
	rm -f "$root/run/xtables.lock"
fi
echo "$out: $(du -sh "$out" | cut -f1)"
