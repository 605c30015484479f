#!/usr/bin/env bash
# Tests for which the kernel here may lack something: local storage on NVMe disks and CephFS with the kernel's client, each in
# a virtual machine of its own. VM_ONLY="local sanity" runs just these of the parts below, and VM_CLASSES says for what
# carves (BERTH_NVME_CLASS of tests/sanity) csi-sanity is run; VM_TESTS filters the tests of `local` by their names.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/berth
PATH="$cache/go/bin:$PATH"
# Longer than any part takes; a command that hangs ends with it.
export VM_TIMEOUT=${VM_TIMEOUT:-3600}
wanted() { [[ " ${VM_ONLY:-local pools power sanity cephfs} " = *" $1 "* ]]; }
! wanted cephfs || scripts/setup.sh lab
! wanted local && ! wanted pools && ! wanted sanity && ! wanted power || scripts/setup.sh vm

# All is built here: in there it would take ten times as long.
built=$(mktemp -d "$cache/test-vm.XXXXXX")
trap 'rm -rf "$built"' EXIT
cargo test --quiet --no-run --test vm_host --test vm_local --test vm_directories --test vm_logical --test vm_pools --test vm_power --test vm_cephfs --test cluster_storage \
  --message-format json >"$built/json"
program() { sed -n "s/.*\"executable\":\"\([^\"]*\/$1\(-[0-9a-f]*\)\?\)\".*/\1/p" "$built/json" | tail -1; }
berth=$(program berth)
# Without symbols it is half as big, which counts: the virtual machine reads programs slowly, and anew each time.
strip -o "$built/berth" "$berth"

failed=()
boot() { # boot COMMAND...: in a virtual machine that has the stripped driver, in memory, in the other's place
  scripts/vm.sh bash -c 'install "$0" /run/berth && mount --bind /run/berth "$1" && shift && exec "$@"' \
    "$built/berth" "$berth" "$@"
}

part() { # part NAME COMMAND...
  local name=$1 begun=$SECONDS status=0
  shift
  echo "== $name, in a virtual machine"
  boot "$@" || status=$?
  case $status in
    0) ;;
    125) echo "SKIPPED $name: no virtual machine can be had here" ;;
    *) failed+=("$name") ;;
  esac
  echo "$name: $((SECONDS - begun)) s"
}

if wanted local; then
  VM_NVME="8G 8G 8G" part local bash -c 'status=0
    for program; do "$program" --ignored --nocapture --test-threads 1 $0 || status=1; done
    exit $status' "${VM_TESTS:-}" "$(program vm_host)" "$(program vm_directories)" \
    "$(program vm_logical)" "$(program vm_local)"
fi

if wanted pools; then
  VM_NVME="1G,1G 1G 1G" part pools "$(program vm_pools)" --ignored --nocapture --test-threads 1 ${VM_TESTS:-}
fi

# Boots on the disks of the boot before, and cuts the power in the middle of the work, unless it is the last boot.
power() { # power ROUND
  local round=$1 said=$built/said.$1 before=$built/said.before machine
  [ -e "$before" ] || : >"$before"
  : >"$said"
  VM_NVME="4G 4G" VM_NVME_DIR=$built/disks VM_MONITOR=$built/monitor boot env BERTH_POWER_ROUND="$round" \
    BERTH_POWER_SAID="$before" "$(program vm_power)" --ignored --nocapture >"$said" 2>&1 &
  machine=$!
  if [ "$round" != last ]; then
    # After so much work, and then at any moment.
    while kill -0 $machine 2>/dev/null && [ "$(grep -ac '^DONE\|^GONE' "$said" || true)" -lt 25 ]; do sleep 0.2; done
    sleep "0.$((RANDOM % 1000))"
    python3 -c 'import socket, sys
monitor = socket.socket(socket.AF_UNIX)
monitor.connect(sys.argv[1])
monitor.send(b"quit\n")
monitor.recv(4096)' "$built/monitor" || true
    wait $machine || true
    ! grep -aq panicked "$said"
  else
    wait $machine
  fi || { cat "$said"; return 1; }
  cp "$said" "$before"
}

if wanted power; then
  begun=$SECONDS
  echo "== power cuts, in a virtual machine"
  power first && power second && power last && grep -a 'test result' "$built/said.last" || failed+=(power)
  echo "power: $((SECONDS - begun)) s"
fi


if ! wanted sanity; then :
elif ! command -v go >/dev/null; then echo "SKIPPED csi-sanity in a virtual machine: no Go; run scripts/setup.sh test"
else
  (cd tests/sanity && GOTOOLCHAIN=local GOFLAGS=-mod=readonly go test -c -o "$built/sanity")
  # Two, since the suite has a pool for mounts and one for block volumes.
  VM_NVME=64G,64G part sanity env BERTH_BIN="$berth" BERTH_NVME_DISKS='/dev/nvme0n1 /dev/nvme0n2' bash -c '
    cd tests/sanity && status=0
    for class; do
      echo "== class $class"
      BERTH_NVME_CLASS=${class#default} "$0" -test.v -test.timeout 20m -test.skip Proto 2>&1 |
        grep -vE "^[[:space:]]+(passed|skipped) |^I[0-9]{4} "
      [ "${PIPESTATUS[0]}" = 0 ] || status=1
    done
    exit $status' "$built/sanity" ${VM_CLASSES:-directory lvm image}
fi

if wanted cephfs; then
  # What differs with the kernel's client.
  differs='two_nodes data_survives a_read_only_volume static_volumes volumes_grow the_quota'
  # The CPU is emulated, so all takes longer.
  VM_MEMORY=${VM_MEMORY:-6G} part cephfs env LAB_DEADLINE=600 TMPDIR=/run BERTH_LAB=/run/lab bash -c '
    scripts/lab.sh up /run/lab && . /run/lab/env && kernel=$0 driver=$1 && shift &&
    "$kernel" --ignored --nocapture --test-threads 1 && "$driver" --nocapture --test-threads 1 "$@"' \
    "$(program vm_cephfs)" "$(program cluster_storage)" $differs
fi

[ ${#failed[@]} = 0 ] || { echo "FAILED in a virtual machine: ${failed[*]}"; exit 1; }
