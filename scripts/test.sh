#!/usr/bin/env bash
# Everything that this machine can test. Ends with what was skipped, and a line `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT
failed=()

part() { # part NAME COMMAND...
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$log/$name"
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

scripts/setup.sh test | tee "$log/setup"
part check make --no-print-directory check
# The binaries are built first, so that building is not counted as a test's time.
part build cargo build --tests --quiet
part integration cargo test --quiet --test '*' -- --show-output
if [ "$(id -u)" = 0 ]; then
  part sanity make --no-print-directory sanity DRIVER=nvme
else
  echo "SKIPPED csi-sanity: needs root, for loop devices and mounts" | tee "$log/sanity"
fi

# Cargo says `test result: ok. 7 passed; 0 failed`, the sanity suite `mount: 75 run, 75 passed, 0 failed`.
count() { cat "$log"/{check,integration,sanity} 2>/dev/null | grep -oE "[0-9]+ $1" | awk '{n += $1} END {print n + 0}'; }
echo
grep -hE '^ *SKIPPED ' "$log"/* | sed 's/^ *//' | sort -u
[ ${#failed[@]} = 0 ] || echo "FAILED: ${failed[*]}"
bad=$(count failed)
[ "$bad" != 0 ] || bad=${#failed[@]}
echo "$(count passed) passed, $bad failed"
[ ${#failed[@]} = 0 ]
