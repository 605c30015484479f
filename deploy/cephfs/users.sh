#!/usr/bin/env bash
# users.sh [--update] FILESYSTEM [GROUP] [CEPH OPTION...]: makes the two users that Berth's cephfs back end wants, each
# with no capability that it can do without, and prints a line `USER KEY` for each. Run it where `ceph` is an administrator.
#
#   berth-provisioner  for the controller: makes and deletes subvolumes in GROUP (csi), and can't read what they hold
#   berth-node         for the nodes: mounts what lies in GROUP, and can't set quotas, take snapshots or see other folders
#
# Both hold for one file system and one group. Users that have these capabilities already stay as they are; other
# capabilities make ceph refuse, and --update replaces them. The keys stay the same.
set -euo pipefail
usage() { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
update=
[ "${1:-}" != --update ] || { update=1; shift; }
filesystem=${1:-}; shift || usage
case $filesystem in '' | -*) usage ;; esac
group=csi
case ${1:-} in '' | -*) ;; *) group=$1; shift ;; esac
# Whatever goes into a capability must not end it.
case $filesystem$group in *[!A-Za-z0-9._-]*) echo "users.sh: a name may have letters, digits, '.', '_' and '-'" >&2; exit 2 ;; esac

commands=(
  'fs subvolumegroup create'
  'fs subvolume create' 'fs subvolume info' 'fs subvolume getpath' 'fs subvolume ls' 'fs subvolume rm'
  'fs subvolume resize' 'fs subvolume pin' 'fs subvolume metadata set' 'fs subvolume metadata get'
  'fs subvolume snapshot create' 'fs subvolume snapshot info' 'fs subvolume snapshot ls' 'fs subvolume snapshot rm'
  'fs subvolume snapshot metadata set' 'fs subvolume snapshot metadata get'
  'fs subvolume snapshot metadata ls'
  'fs clone status' 'fs clone cancel'
)
within="vol_name=$filesystem group_name=$group"
mgr=$(printf "allow command \"%s\" with $within, " "${commands[@]}")
# Without the last word, it could fill any other group with clones.
mgr+="allow command \"fs subvolume snapshot clone\" with $within target_group_name=$group"

user() { # user NAME CAPABILITY...
  local name=$1 key
  shift
  if [ -n "$update" ]; then
    ceph "${options[@]}" auth get-or-create "client.$name" >/dev/null
    ceph "${options[@]}" auth caps "client.$name" "$@" 2>&1 | { grep -v '^updated caps' >&2 || true; }
  fi
  key=$(ceph "${options[@]}" auth get-or-create-key "client.$name" "$@") || exit
  echo "$name $key"
}

options=("$@")
user berth-provisioner mon "allow r fsname=$filesystem" mgr "$mgr"
user berth-node mon "allow r fsname=$filesystem" mds "allow rw fsname=$filesystem path=/volumes/$group" \
  osd "allow rw tag cephfs data=$filesystem"
