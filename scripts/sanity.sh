#!/usr/bin/env bash
# sanity.sh DRIVER: csi-sanity against the binary of this checkout, and the protocol files against the published ones.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${XDG_CACHE_HOME:-$HOME/.cache}/berth/go/bin:$PATH"
command -v go >/dev/null || { echo "SKIPPED csi-sanity: no Go; run scripts/setup.sh test"; exit 0; }
cargo build --quiet
target=${CARGO_TARGET_DIR:-$PWD/target}
cd tests/sanity
# A Go that came along elsewhere must not fetch another one over the network.
GOTOOLCHAIN=local GOFLAGS=-mod=readonly BERTH_BIN=$(realpath "$target/debug/berth") BERTH_DRIVER=$1 \
  go test -count=1 -timeout 20m -v ./... 2>&1 | grep -vE '^[[:space:]]+(passed|skipped) |^I[0-9]{4} '
