#!/usr/bin/env bash
# The tests that need a kernel with CephFS: in a virtual machine, beside a cluster that runs there too.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh lab
test=$(cargo test --quiet --no-run --test vm_cephfs --message-format json |
  sed -n 's/.*"executable":"\([^"]*vm_cephfs[^"]*\)".*/\1/p')
# The CPU is emulated, so all takes longer.
status=0
VM_MEMORY=${VM_MEMORY:-6G} scripts/vm.sh env LAB_DEADLINE=600 bash -c '
  scripts/lab.sh up /run/lab && . /run/lab/env && exec "$0" --ignored --nocapture --test-threads 1' "$test" || status=$?
[ "$status" != 125 ] || { echo "SKIPPED vm_cephfs: no virtual machine can be had here"; exit 0; }
exit "$status"
