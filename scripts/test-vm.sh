#!/usr/bin/env bash
# The tests that need a kernel with CephFS: in a virtual machine, beside a cluster that runs there too.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh lab
program() { # program TEST
  cargo test --quiet --no-run --test "$1" --message-format json | sed -n "s/.*\"executable\":\"\([^\"]*$1[^\"]*\)\".*/\1/p"
}
kernel=$(program vm_cephfs)
driver=$(program cluster_storage)
# What differs with the kernel's client.
differs='two_nodes data_survives a_read_only_volume static_volumes volumes_grow the_quota'
# The CPU is emulated, so all takes longer.
status=0
VM_MEMORY=${VM_MEMORY:-6G} scripts/vm.sh env LAB_DEADLINE=600 TMPDIR=/run BERTH_LAB=/run/lab bash -c '
  scripts/lab.sh up /run/lab && . /run/lab/env && kernel=$0 driver=$1 && shift &&
  "$kernel" --ignored --nocapture --test-threads 1 && "$driver" --nocapture --test-threads 1 "$@"' \
  "$kernel" "$driver" $differs || status=$?
[ "$status" != 125 ] || { echo "SKIPPED vm_cephfs: no virtual machine can be had here"; exit 0; }
exit "$status"
