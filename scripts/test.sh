#!/usr/bin/env bash
# Everything that this machine can test. Ends with what was skipped, and a line `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp -d)
labs=()
starting=()
lab=$PWD/scripts/lab.sh

end_labs() { # side by side: each takes a moment
  local dir
  [ ${#starting[@]} = 0 ] || { kill "${starting[@]}" 2>/dev/null; wait; } # each takes away what it has begun
  for dir in ${labs[@]+"${labs[@]}"}; do "$lab" down "$dir" & done
  wait
  labs=()
}
trap 'end_labs; rm -rf "$log"' EXIT
failed=()

part() { # part NAME COMMAND...
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$log/$name"
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

# Two Ceph clusters, for the tests that want one and those that want another one too. What they say, should they not
# start, is shown.
start_labs() {
  local why a b rgw
  [ "$(id -u)" = 0 ] || { echo "SKIPPED CephFS: needs root, for mounts"; return; }
  why=$("$lab" check 2>&1) || { echo "SKIPPED CephFS: $why"; return; }
  labs=("$(mktemp -d)" "$(mktemp -d)")
  # The first has S3, too.
  rgw=1
  command -v radosgw >/dev/null && command -v radosgw-admin >/dev/null || { rgw=; echo "SKIPPED RGW: no radosgw"; }
  RGW=$rgw "$lab" up "${labs[0]}" 40100 & a=$!
  "$lab" up "${labs[1]}" 40200 & b=$!
  starting=($a $b)
  wait $a; a=$?
  wait $b; b=$?
  starting=()
  if [ $a = 0 ] && [ $b = 0 ]; then
    export BERTH_LAB=${labs[0]} BERTH_LAB_B=${labs[1]}
  else
    echo "SKIPPED CephFS: the clusters did not start; see above"
  fi
}

scripts/setup.sh test | tee "$log/setup"
unset BERTH_LAB BERTH_LAB_B # a cluster that someone works with is not for tests
part check make --no-print-directory check
# The binaries are built first, so that building is not counted as a test's time.
part build cargo build --tests --quiet
start_labs >"$log/labs" 2>&1
cat "$log/labs"
part integration cargo test --quiet --no-fail-fast --test '*' -- --show-output
end_labs
unset BERTH_LAB BERTH_LAB_B # tests stop its daemons: csi-sanity starts one of its own
if [ "$(id -u)" = 0 ]; then
  part sanity make --no-print-directory sanity DRIVER=nvme
  part sanity-cephfs make --no-print-directory sanity DRIVER=cephfs
  part sanity-s3 make --no-print-directory sanity DRIVER=s3
  # A part of what `make test-vm` has: all of it takes the better part of an hour.
  part vm env VM_ONLY="${VM_ONLY:-pools power sanity}" VM_CLASSES="${VM_CLASSES:-directory}" make --no-print-directory test-vm
else
  echo "SKIPPED csi-sanity and virtual machines: need root, for loop devices and mounts" | tee "$log/sanity"
fi

# Cargo says `test result: ok. 7 passed; 0 failed`, the sanity suite `mount: 75 run, 75 passed, 0 failed`.
count() { cat "$log"/{check,integration,sanity,sanity-cephfs,sanity-s3,vm} 2>/dev/null | grep -oE "[0-9]+ $1" | awk '{n += $1} END {print n + 0}'; }
echo
grep -hE '^ *SKIPPED ' "$log"/* | sed 's/^ *//' | sort -u
[ ${#failed[@]} = 0 ] || echo "FAILED: ${failed[*]}"
bad=$(count failed)
[ "$bad" != 0 ] || bad=${#failed[@]}
echo "$(count passed) passed, $bad failed"
[ ${#failed[@]} = 0 ]
