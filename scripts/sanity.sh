#!/usr/bin/env bash
# sanity.sh DRIVER: csi-sanity against the binary of this checkout, and the protocol files against the published ones.
# For cephfs: against the cluster of lab.sh below $BERTH_LAB, or else one for this run. For s3: against MinIO with a bucket
# for each volume and with prefixes in one bucket, and against the RGW of such a cluster where this machine can have one.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/berth
PATH="$cache/go/bin:$PATH"
command -v go >/dev/null || { echo "SKIPPED csi-sanity: no Go; run scripts/setup.sh test"; exit 0; }
cargo build --quiet
target=${CARGO_TARGET_DIR:-$PWD/target}
lab=$PWD/scripts/lab.sh

start_lab() { # start_lab PORT
  if [ -z "${BERTH_LAB:-}" ]; then
    BERTH_LAB=$(mktemp -d)
    trap '"$lab" down "$BERTH_LAB"' EXIT
    "$lab" up "$BERTH_LAB" "$1"
  fi
  . "$BERTH_LAB/env"
}

run() { # run DRIVER
  # A Go that came along elsewhere must not fetch another one over the network.
  (cd tests/sanity && GOTOOLCHAIN=local GOFLAGS=-mod=readonly BERTH_BIN=$(realpath "$target/debug/berth") BERTH_DRIVER=$1 \
    go test -count=1 -timeout 20m -v ./... 2>&1 | grep -vE '^[[:space:]]+(passed|skipped) |^I[0-9]{4} ')
}

case $1 in
  cephfs)
    why=$("$lab" check 2>&1) || [ -n "${BERTH_LAB:-}" ] || { echo "SKIPPED csi-sanity of cephfs: $why"; exit 0; }
    start_lab 40300
    run cephfs
    ;;
  s3)
    failed=0
    if [ -x "$cache/bin/minio" ]; then
      for class in bucket prefix; do
        echo "== MinIO, class $class"
        BERTH_MINIO=$cache/bin/minio BERTH_S3_CLASS=$class run s3 || failed=1
      done
    else
      echo "SKIPPED csi-sanity of s3 on MinIO: no $cache/bin/minio; run scripts/setup.sh test"
    fi
    if why=$(RGW=1 "$lab" check 2>&1) || [ -n "${BERTH_LAB_S3_ENDPOINT:-}" ]; then
      RGW=1 start_lab 40300
      for class in bucket prefix; do
        echo "== RGW, class $class"
        BERTH_S3_CLASS=$class run s3 || failed=1
      done
    else
      echo "SKIPPED csi-sanity of s3 on RGW: $why"
    fi
    exit $failed
    ;;
  *) run "$1" ;;
esac
