#!/usr/bin/env bash
# Shows the plugin at work on this machine; may be repeated. Installs an engine
# where there is none, starts it if it does not answer, enables the plugin as
# weft:latest and lets two containers reach each other on the network net1.
#   DOCKER_HOST    where the engine listens, a unix:// address
#   DOCKERD_FLAGS  further flags for an engine that has to be started
#   PORT           the host's port that is published, 8080
set -euo pipefail
cd "$(dirname "$0")/.."
plugin=weft:latest image=weft-busybox network=net1 label=weft.example port=${PORT:-8080}
sock=${DOCKER_HOST:-unix:///var/run/docker.sock}
export DOCKER_HOST=$sock

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
# show prints a command as it could be typed, and runs it.
show() {
	printf '$'
	for a; do [[ $a == *[!a-zA-Z0-9_=:./-]* ]] && printf " '%s'" "$a" || printf ' %s' "$a"; done
	printf '\n'
	"$@"
}
answers() { docker version >/dev/null 2>&1; }
[ "$(id -u)" = 0 ] || { echo "run this as root" >&2; exit 1; }

missing=()
command -v docker >/dev/null && { answers || command -v dockerd >/dev/null; } || missing+=(docker.io)
[ -x /bin/busybox ] && dpkg-query -W busybox-static >/dev/null 2>&1 || missing+=(busybox-static)
if [ ${#missing[@]} -gt 0 ]; then
	say "installing ${missing[*]}"
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" iptables
fi

# The package may just have started the engine as a service.
for _ in 1 2 3; do answers && break; sleep 1; done
if ! answers; then
	say "starting an engine, log in build/dockerd.log"
	# shellcheck disable=SC2086 # flags are words
	setsid dockerd --host "$sock" --pidfile "$PWD/build/dockerd.pid" ${DOCKERD_FLAGS:-} >build/dockerd.log 2>&1 </dev/null &
	engine=$!
	for i in $(seq 60); do
		answers && break
		kill -0 $engine 2>/dev/null && [ "$i" -lt 60 ] || { tail -20 build/dockerd.log >&2; echo "the engine did not start" >&2; exit 1; }
		sleep 0.5
	done
	echo "stop it with: kill $engine"
fi
echo "engine $(docker version --format '{{.Server.Version}}')"

# What an earlier run made goes first; networks of others keep the plugin that they use.
docker ps -aq --filter "label=$label" | xargs -r docker rm -f >/dev/null
docker network ls -q --filter "label=$label" | xargs -r docker network rm >/dev/null
settings=()
if docker plugin inspect "$plugin" >/dev/null 2>&1; then
	used=$(docker network ls --filter "driver=$plugin" --format '{{.Name}}' | xargs)
	if [ -n "$used" ]; then
		say "keeping the $plugin that is there: networks use it ($used)"
		docker plugin enable "$plugin" >/dev/null 2>&1 || true
	else
		say "replacing the $plugin that is there, keeping its settings"
		mapfile -t settings < <(docker plugin inspect -f '{{range .Settings.Env}}{{println .}}{{end}}' "$plugin" | grep -v '=$' | grep .)
		docker plugin rm -f "$plugin" >/dev/null
	fi
fi
if ! docker plugin inspect "$plugin" >/dev/null 2>&1; then
	say "creating and enabling $plugin"
	show docker plugin create "$plugin" build/plugin
	[ ${#settings[@]} -eq 0 ] || show docker plugin set "$plugin" "${settings[@]}"
	show docker plugin enable "$plugin"
fi

if ! docker image inspect $image >/dev/null 2>&1; then
	say "making the image $image from this machine's busybox"
	tar -C / -c --transform 's,^bin/busybox$,bin/sh,' bin/busybox | docker import - $image >/dev/null
fi

if docker network inspect $network >/dev/null 2>&1; then
	echo "there is already a network $network that this did not make; remove it first" >&2
	exit 1
fi
say "two containers on a network"
show docker network create --label $label -d $plugin --ipam-driver $plugin $network
show docker run -d --name weft-web --label $label --network $network -p "$port:80" $image \
	sh -c 'busybox mkdir -p /www && echo hello from weft-web >/www/index.html && exec busybox httpd -f -p 80 -h /www' sh
show docker run --rm --label $label --network $network $image \
	sh -c 'busybox ip -4 addr show eth0; busybox ping -c 2 weft-web && busybox wget -qO- http://weft-web/' sh
say "the published port, from this machine"
show docker run --rm --network host $image sh -c 'busybox wget -qO- http://127.0.0.1:'"$port"'/' sh

say "done: weft-web is still running on $network. What the plugin says:"
id=$(docker plugin inspect -f '{{.Id}}' $plugin)
root=$(docker info --format '{{.DockerRootDir}}')
show build/weft status --socket "$root/plugins/$id/propagated-mount/admin.sock"
echo "clean up with: docker rm -f weft-web; docker network rm $network"
