# The image of Berth: the binary and the programs that make and repair file systems, nothing else.
#
#   docker build --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" -t registry.example.com/berth:0.1.0 .
#
# Both stages are the same Debian release, so the binary finds the C library that it was linked with.
ARG RUST_IMAGE=docker.io/library/rust:1.95.0-slim-bookworm
ARG RUNTIME_IMAGE=docker.io/library/debian:12.11-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
COPY benches benches
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin berth \
    && install -D target/release/berth /out/berth

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Berth" \
      org.opencontainers.image.description="A Container Storage Interface driver for ML platforms" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The certificates that S3 services are checked with; mkfs.xfs; mkfs.ext4, and e2fsck for a person with a damaged volume; LVM and
# cryptsetup for volume groups; wipefs (util-linux is there) for what is on a disk. Everything else (mounting, loop devices, quotas, growing)
# Berth asks of the kernel.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates cryptsetup-bin e2fsprogs lvm2 xfsprogs \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/berth /usr/bin/berth
# Root, and privileged in its pod: a node driver mounts file systems where kubelet and every pod see them, and attaches
# loop devices. Both need CAP_SYS_ADMIN in the node's own user namespace; no other user can be given it.
USER 0:0
ENTRYPOINT ["/usr/bin/berth"]
