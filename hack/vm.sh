#!/usr/bin/env bash
# Runs a command as root in a virtual machine that has this machine's files and
# Debian's kernel with all its modules: hack/vm.sh DIR COMMAND [ARG...].
#
# The output is the command's, both streams on stdout, and so is the exit
# status. A machine that ends without a result is a failure, and the end of its
# console is shown. The files are this machine's, read-only below a layer of
# memory: what the command writes is gone with the machine. It has no network
# but loopback, and of the environment only what COMMAND sets, as with env A=b.
#
#   VM_TIMEOUT  after what time the machine is switched off, 30m
#   VM_CONSOLE  file that keeps the kernel's console
#
# The processor is emulated: KVM is not there in most places that tests run in.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: hack/vm.sh DIR COMMAND [ARG...]" >&2; exit 2; }
dir=$(cd "$1" && pwd)
shift
limit=${VM_TIMEOUT:-30m}
cd "$(dirname "$0")/.."
cache=$PWD/build/cache/vm

[ "$(id -u)" = 0 ] || { echo "hack/vm.sh: run this as root" >&2; exit 1; }
[ "$(uname -m)" = x86_64 ] || { echo "hack/vm.sh: this machine is $(uname -m), only x86_64 is known" >&2; exit 1; }
missing=()
for t in apt-get dpkg-deb depmod modprobe cpio busybox qemu-system-x86_64 setpriv timeout; do
	command -v $t >/dev/null || missing+=("$t")
done
# The first stage of the boot has no libraries.
if command -v busybox >/dev/null && ldd "$(command -v busybox)" >/dev/null 2>&1; then
	missing+=("a static busybox")
fi
[ ${#missing[@]} -eq 0 ] || { echo "hack/vm.sh: missing ${missing[*]} (hack/deps.sh installs them)" >&2; exit 1; }

tmp=$(mktemp -d)
vm=
finish() {
	[ -z "$vm" ] || { kill "$vm" && wait "$vm"; } 2>/dev/null || true
	rm -rf "$tmp"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# linux-image-amd64 depends on the package of the newest kernel, which has the
# kernel's version in its name. Lists of packages that are too old name one
# that is no longer there, so they are renewed before a download.
newest() { apt-cache depends linux-image-amd64 2>/dev/null | awk '$1 == "Depends:" {print $2}' || true; }
package=$(newest)
if [ -z "$package" ] || [ ! -d "$cache/$package" ]; then
	apt-get update -q >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; exit 1; }
	package=$(newest)
	[ -n "$package" ] || { echo "hack/vm.sh: no package linux-image-amd64 in apt's lists" >&2; exit 1; }
fi
version=${package#linux-image-}
if [ ! -d "$cache/$package" ]; then
	echo "downloading $package" >&2
	# Under another name first: what was interrupted must not pass for finished.
	rm -rf "$cache"
	mkdir -p "$cache/unfinished"
	(cd "$tmp" && apt-get download -q -o APT::Sandbox::User=root "$package") >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; exit 1; }
	dpkg-deb -x "$tmp"/linux-image-*.deb "$cache/unfinished"
	depmod -b "$cache/unfinished" "$version"
	mv "$cache/unfinished" "$cache/$package"
	rm "$tmp"/linux-image-*.deb
fi
kernel=$cache/$package

# The first stage: what it takes to reach this machine's files.
mkdir -p "$tmp"/initramfs/{bin,dev,lower,modules,root,upper}
cp "$(command -v busybox)" "$tmp/initramfs/bin/busybox"
n=100 # the order of loading is the order of the names
for m in virtio_pci virtio_console 9p 9pnet_virtio overlay; do
	while read -r file; do
		cp "$file" "$tmp/initramfs/modules/$((n++))-${file##*/}"
	done < <(modprobe -d "$kernel" -S "$version" --show-depends $m | sed -n 's/^insmod \(.*\.ko[.a-z]*\) .*/\1/p')
done
cat >"$tmp/initramfs/init" <<EOF
#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for m in /modules/*; do
	insmod "\$m" 2>/dev/null || true # several depend on the same
done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /lower
mount -t tmpfs -o size=75% upper /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
mount --move /dev /root/dev
cd /root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir -p dev/pts dev/shm
mount -t devpts devpts dev/pts
mount -t tmpfs shm dev/shm
ln -sfn /proc/self/fd dev/fd
ln -sfn /proc/self/fd/0 dev/stdin
ln -sfn /proc/self/fd/1 dev/stdout
ln -sfn /proc/self/fd/2 dev/stderr
mount -t tmpfs -o size=75%,mode=755 run run
mkdir -p run/tmp var/lib/docker lib/modules
chmod 1777 run/tmp
mount -t tmpfs -o size=75% docker var/lib/docker
# No other modules fit the kernel.
mount -t tmpfs modules lib/modules
ln -s $(printf %q "$kernel/lib/modules/$version") lib/modules/$version
ip link set lo up
hostname vm
cp /bin/busybox /guest run/
exec switch_root /root /bin/bash /run/guest
EOF
# The second stage is process 1 for as long as the command runs. The command
# writes into a pipe and not to the port, which only one process may open. What
# it leaves running would keep the pipe open, and so is killed. TMPDIR is a file
# system of its own, because an engine's layers cannot be in an overlay.
cat >"$tmp/initramfs/guest" <<EOF
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TMPDIR=/run/tmp
for _ in \$(seq 100); do
	ports=(/dev/vport?p[12])
	[ \${#ports[@]} = 1 ] || break
	sleep 0.1
done
exec 3> >(exec cat >"\${ports[0]}")
cat=\$!
(cd $(printf %q "$dir") && exec $(printf '%q ' "$@")) </dev/null >&3 2>&1 3>&-
status=\$?
exec 3>&-
for p in /proc/[0-9]*; do
	p=\${p#/proc/}
	[ \$p = 1 ] || [ \$p = \$cat ] || kill -9 \$p 2>/dev/null
done
wait \$cat
echo \$status >"\${ports[1]}"
/run/busybox poweroff -f
EOF
chmod +x "$tmp/initramfs/init"
(cd "$tmp/initramfs" && find . | cpio -o -H newc --quiet) >"$tmp/initrd"

# The kernel writes to the serial console, the command to a port of its own and
# its status to another, so that nothing has to be told apart. If this script is
# killed, timeout ends as well and takes the machine along.
exec 3> >(exec cat)
reader=$!
console=${VM_CONSOLE:-$tmp/console}
qemu=(qemu-system-x86_64 -nodefaults -accel "tcg,thread=multi" -cpu max -m 4096 -smp 2 -nic none -display none -no-reboot
	-kernel "$kernel/boot/vmlinuz-$version" -initrd "$tmp/initrd" -append "console=ttyS0 quiet panic=-1 mitigations=off"
	-virtfs "local,path=/,mount_tag=root,security_model=passthrough,readonly=on,multidevs=remap"
	-serial "file:$console" -device virtio-serial-pci
	-chardev "file,id=output,path=/dev/fd/3" -device "virtserialport,nr=1,chardev=output"
	-chardev "file,id=status,path=$tmp/status" -device "virtserialport,nr=2,chardev=status")
setpriv --pdeathsig TERM timeout -k 5 "$limit" "${qemu[@]}" </dev/null &
vm=$!
exec 3>&-
# When nobody reads the output any more, there is no use in going on.
wait $reader || kill $vm 2>/dev/null || true
code=0
wait $vm || code=$?
vm=
status=$(cat "$tmp/status" 2>/dev/null || true)
[[ $status =~ ^[0-9]+$ ]] && exit "$status"
if [ $code = 124 ]; then
	echo "hack/vm.sh: no result after $limit" >&2
else
	echo "hack/vm.sh: the machine ended without a result (qemu: $code)" >&2
fi
echo "end of its console:" >&2
tail -n 30 "$console" >&2 || true
exit 1
