#!/usr/bin/env bash
# vm.sh COMMAND...: runs a command as root on a stock Debian kernel, in a virtual machine, for what the kernel here lacks.
#
# The machine's root is this one's, and what is written there is lost. /run, /tmp and /var/tmp are empty, there is no
# network but `lo`, and TMPDIR is on a tmpfs. Output, and the exit status, are the command's (255: the machine fell over).
#   VM_MEMORY  4G     VM_CPUS  2     VM_TIMEOUT  1200 (seconds)
#   VM_KVM=1   hardware virtualisation. Without, the CPU is emulated: some ten times slower, but it runs everywhere.
#   VM_NVME="1G,1G 512M"   NVMe controllers with the serials berth0001, berth0002, ..., and the sizes of each one's namespaces.
#              Which of them is /dev/nvme0 differs from boot to boot, as on any machine: /dev/disk/by-id tells.
#   VM_NVME_DIR   where the disks' files, which are sparse, are kept and found again by a later boot. Else they are thrown away.
#   VM_MONITOR   a socket to be made, where QEMU takes commands: `device_del nvme1` pulls out the first controller, `quit` is a
#              power cut. (So is `echo b >/proc/sysrq-trigger` inside, and `echo 1 >/sys/block/nvme0n1/device/device/remove` pulls.)
# udevd runs in there, with the rules that are installed here: it makes the links in /dev/disk, and looks into each new device.
# /etc/lvm is empty: LVM has its defaults. /sys/fs/cgroup is cgroup v2, with all controllers.
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
thrown_away=$(mktemp -d "$cache/disks.XXXXXX")
trap 'rm -rf "$script" "$thrown_away"' EXIT
disks=${VM_NVME_DIR:-$thrown_away}
mkdir -p "$disks"
qemu=()
controller=0 namespaces=0
for sizes in ${VM_NVME:-}; do
  ((++controller))
  serial=$(printf 'berth%04d' $controller)
  # Behind a port of its own: nothing else can be pulled out.
  qemu+=(-device "pcie-root-port,id=port$controller,chassis=$controller")
  qemu+=(-device "nvme,id=nvme$controller,bus=port$controller,serial=$serial")
  number=0
  for size in ${sizes//,/ }; do
    ((++number, ++namespaces))
    file=$disks/$serial.$number
    [ -e "$file" ] || truncate -s "$size" "$file"
    # Flushes need not reach this machine's disk: it is the virtual machine that is crashed, never this one.
    qemu+=(-drive "file=$file,id=disk$namespaces,if=none,format=raw,cache=unsafe,discard=unmap")
    qemu+=(-device "nvme-ns,drive=disk$namespaces,bus=nvme$controller,nsid=$number")
  done
done
[ -z "${VM_MONITOR:-}" ] || qemu+=(-monitor "unix:$VM_MONITOR,server=on,wait=off")
cat >"$script" <<SCRIPT
export TMPDIR=/run PATH=$(printf %q "$PATH") HOME=$(printf %q "$HOME")
ip link set lo up
modprobe -a nvme xfs dm-mod dm-crypt dm-flakey loop || exit 255
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 255
for _ in {1..200}; do [ "\$(ls -d /sys/block/nvme* 2>/dev/null | wc -l)" -ge $namespaces ] && break; sleep 0.1; done
udevadm settle
cd $(printf %q "$PWD") || exit 125
$(printf '%q ' "$@")
SCRIPT
[ "${VM_KVM:-}" = 1 ] && kvm=() || kvm=(--disable-kvm)
# Through pipes: qemu opens its outputs anew, and so would write over what a file holds already.
{
  PATH="$cache/vng/bin:$PATH" timeout -k 5 "${VM_TIMEOUT:-1200}" vng --run "$(echo "$cache"/kernel/boot/vmlinuz-*)" \
    "${kvm[@]}" --cpus "${VM_CPUS:-2}" --memory "${VM_MEMORY:-4G}" ${qemu[0]:+"--qemu-opts=${qemu[*]}"} \
    -- "bash $script" </dev/null 2>&1 >&3 | cat >&2
} 3>&1 | cat
