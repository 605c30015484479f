#!/usr/bin/env bash
# sanity.sh DRIVER: csi-sanity against the binary of this checkout, and the protocol files against the published ones.
# For cephfs: against the cluster of lab.sh below $BERTH_LAB, or else one for this run.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${XDG_CACHE_HOME:-$HOME/.cache}/berth/go/bin:$PATH"
command -v go >/dev/null || { echo "SKIPPED csi-sanity: no Go; run scripts/setup.sh test"; exit 0; }
cargo build --quiet
target=${CARGO_TARGET_DIR:-$PWD/target}
if [ "$1" = cephfs ]; then
  if [ -z "${BERTH_LAB:-}" ]; then
    why=$(scripts/lab.sh check 2>&1) || { echo "SKIPPED csi-sanity of cephfs: $why"; exit 0; }
    BERTH_LAB=$(mktemp -d)
    lab=$PWD/scripts/lab.sh
    trap '"$lab" down "$BERTH_LAB"' EXIT
    "$lab" up "$BERTH_LAB" 40300
  fi
  . "$BERTH_LAB/env"
fi
cd tests/sanity
# A Go that came along elsewhere must not fetch another one over the network.
GOTOOLCHAIN=local GOFLAGS=-mod=readonly BERTH_BIN=$(realpath "$target/debug/berth") BERTH_DRIVER=$1 \
  go test -count=1 -timeout 20m -v ./... 2>&1 | grep -vE '^[[:space:]]+(passed|skipped) |^I[0-9]{4} '
