#!/usr/bin/env bash
# The rows of the benchmark that need NVMe disks, project quotas and device mapper, in a virtual machine. The CPU there is emulated,
# so only ratios mean anything. BENCH_QUICK and the like are passed on.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh vm
bench=$(cargo bench --quiet --no-run --bench berth --message-format json | sed -n 's/.*"executable":"\([^"]*\/berth-[0-9a-f]*\)".*/\1/p' | tail -1)
settings=()
for name in BENCH_QUICK BENCH_SECONDS; do [ -z "${!name:-}" ] || settings+=("$name=${!name}"); done
status=0
# By serial: which disk is nvme0 differs from boot to boot, and all are alike.
VM_TIMEOUT=${VM_TIMEOUT:-3000} VM_MEMORY=${VM_MEMORY:-4G} VM_NVME="256G 256G 256G" scripts/vm.sh env "${settings[@]}" BENCH_ONLY=nvme \
  BENCH_DISKS=/dev/nvme0n1,/dev/nvme1n1,/dev/nvme2n1 "$bench" --bench || status=$?
[ "$status" != 125 ] || { echo "SKIPPED nvme: no virtual machine can be had here"; exit 0; }
exit "$status"
