# The same rootfs as `make plugin`, for machines that are not Debian but have
# a registry to pull the base images from:
#   docker build -o build/plugin/rootfs . && cp plugin.json build/plugin/config.json
FROM golang:1.26-bookworm AS binary
WORKDIR /src
COPY . .
ARG VERSION=dev COMMIT=unknown
RUN CGO_ENABLED=0 go build -trimpath -tags nosystemd -buildvcs=false \
    -ldflags "-s -w -X main.version=$VERSION -X main.commit=$COMMIT" -o /weft ./cmd/weft

FROM debian:bookworm-slim AS rootfs
RUN apt-get update && apt-get install -y --no-install-recommends iptables
COPY --from=binary /weft /out/weft
RUN set -eu; mkdir -p /out/usr/sbin /out/run/docker/plugins /out/var/lib/weft /out/tmp; \
    modules=$(dirname "$(find /usr/lib -name libxt_mark.so)"); \
    for v in nft legacy; do \
        cp /usr/sbin/xtables-$v-multi /out/usr/sbin/; \
        ln -s xtables-$v-multi /out/usr/sbin/iptables-$v; \
        ln -s xtables-$v-multi /out/usr/sbin/ip6tables-$v; \
    done; \
    mkdir -p /out$modules; \
    cp -P $modules/lib*.so /out$modules/; \
    ldd /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi $modules/lib*.so \
        | grep -o '/[^ )]*' | grep -v ':$' | sort -u \
        | while read -r lib; do mkdir -p "/out$(dirname "$lib")"; cp -L "$lib" "/out$lib"; done; \
    chroot /out /usr/sbin/iptables-nft -V; chroot /out /usr/sbin/ip6tables-legacy -V

FROM scratch
COPY --from=rootfs /out /
