#!/usr/bin/env bash
# vm.sh COMMAND...: runs a command as root on a stock Debian kernel, in a virtual machine, for what the kernel here lacks.
#
# The machine's root is this one's, and what is written there is lost. /run, /tmp and /var/tmp are empty, there is no
# network but `lo`, and TMPDIR is on a tmpfs. Output, and the exit status, are the command's (255: the machine fell over).
#   VM_MEMORY  4G     VM_CPUS  2     VM_TIMEOUT  1200 (seconds)
#   VM_KVM=1   hardware virtualisation. Without, the CPU is emulated: some ten times slower, but it runs everywhere.
set -euo pipefail
[ $# -gt 0 ] || { sed -n 's/^# \(vm.sh .*\)/usage: \1/p' "$0" >&2; exit 2; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/berth/vm
die() { echo "vm.sh: $*" >&2; exit 125; }

# The virtual machine has file systems of its own there.
for place in "$PWD" "$cache"; do
  case $(realpath -m "$place")/ in /run/* | /tmp/* | /var/tmp/*) die "$place can't be seen in the virtual machine" ;; esac
done

install_missing() {
  local packages=()
  command -v qemu-system-x86_64 >/dev/null || packages+=(qemu-system-x86)
  [ -x /bin/busybox ] || packages+=(busybox-static)
  command -v ip >/dev/null || packages+=(iproute2)
  command -v depmod >/dev/null || [ -x /sbin/depmod ] || packages+=(kmod)
  command -v udevadm >/dev/null || packages+=(udev)
  python3 -m venv --help >/dev/null 2>&1 || packages+=(python3-venv)
  if [ ${#packages[@]} -gt 0 ]; then
    echo "installing: ${packages[*]}"
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends "${packages[@]}" >/dev/null || return
  fi
  if [ ! -x "$cache/vng/bin/vng" ]; then
    python3 -m venv "$cache/vng" && "$cache/vng/bin/pip" install -q virtme-ng==1.42 || return
  fi
  # Unpacked beside its place, so that an interrupted download leaves nothing that looks whole. Never installed: this
  # machine's own boot is none of our business.
  if [ ! -e "$cache/kernel" ]; then
    local kernel fresh
    kernel=$(apt-cache depends linux-image-amd64 | awk '/Depends:/ {print $2; exit}')
    fresh=$(mktemp -d "$cache/kernel.XXXXXX")
    echo "downloading: $kernel"
    (cd "$fresh" && apt-get download -qq "$kernel" && dpkg -x ./*.deb . && rm ./*.deb) || return
    PATH=$PATH:/sbin depmod -b "$fresh" "$(ls "$fresh/lib/modules")" && mv -T "$fresh" "$cache/kernel"
  fi
}
[ "$(uname -m)" = x86_64 ] || die "only for x86_64"
mkdir -p "$cache"
install_missing >&2 || die "cannot get qemu, virtme-ng or a kernel"

script=$(mktemp "$cache/command.XXXXXX")
trap 'rm -f "$script"' EXIT
cat >"$script" <<SCRIPT
export TMPDIR=/run PATH=$(printf %q "$PATH") HOME=$(printf %q "$HOME")
ip link set lo up
cd $(printf %q "$PWD") || exit 125
$(printf '%q ' "$@")
SCRIPT
[ "${VM_KVM:-}" = 1 ] && kvm=() || kvm=(--disable-kvm)
# Through pipes: qemu opens its outputs anew, and so would write over what a file holds already.
{
  PATH="$cache/vng/bin:$PATH" timeout -k 5 "${VM_TIMEOUT:-1200}" vng --run "$(echo "$cache"/kernel/boot/vmlinuz-*)" \
    "${kvm[@]}" --cpus "${VM_CPUS:-2}" --memory "${VM_MEMORY:-4G}" -- "bash $script" </dev/null 2>&1 >&3 | cat >&2
} 3>&1 | cat
