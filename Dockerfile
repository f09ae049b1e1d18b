# syntax=docker/dockerfile:1
# The image of the driver. `make image` makes the same file system without Docker.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
COPY internal internal
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /csi-imgdisk ./cmd/csi-imgdisk

FROM debian:bookworm-slim AS rootfs
RUN apt-get update && apt-get install -y --no-install-recommends debootstrap ca-certificates
ARG DEBIAN_MIRROR=http://deb.debian.org/debian
COPY image/packages image/rootfs.sh /image/
# mknod and mount are not allowed in a build: debootstrap goes without.
RUN DEBIAN_MIRROR=${DEBIAN_MIRROR} /image/rootfs.sh /rootfs

FROM scratch
COPY --from=rootfs /rootfs /
COPY --from=build /csi-imgdisk /usr/local/bin/csi-imgdisk
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LABEL org.opencontainers.image.title=csi-imgdisk org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=https://github.com/csi-imgdisk/csi-imgdisk
ENTRYPOINT ["/usr/local/bin/csi-imgdisk"]
