#!/usr/bin/env bash
# A real Ceph cluster on one host, for tests and for trying things out: monitor, manager, an OSD in memory, and an MDS
# with the file system `cephfs`, of the pools cephfs.meta, cephfs.data and cephfs.bulk.
#
#   lab.sh up DIR [BASE_PORT]            starts it; all that it writes is below DIR. Source DIR/env to use it.
#                                        The monitor takes the first free pair of ports from BASE_PORT (40000) on.
#                                        RGW=1 adds S3. OSD_BYTES is the room that the OSD has (4 GiB).
#                                        LAB_DEADLINE is how long that may take (60 seconds).
#   lab.sh restart DIR mon|mgr|osd|mds   kills that daemon, if it lives, and starts it on the data that it had. Returns
#                                        when it has started, not when it serves. The OSD's data dies with it: refused.
#   lab.sh down DIR                      stops all that and removes DIR
#   lab.sh check                         fails, and says why, if this machine lacks what it needs
#
# Any number of clusters can run side by side.
set -euo pipefail
umask 077 # keys are below DIR
deploy=$(realpath "$(dirname "$0")/../deploy/cephfs")
host=127.0.0.1
deadline=${LAB_DEADLINE:-60} # seconds
mark="# Written by Berth's lab.sh: 'down' removes this folder."

die() { echo "lab.sh: $*" >&2; exit 1; }

# Only the pid that we wrote, and only while it is still the daemon of this cluster: pids are used again. A zombie, which
# stays where init reaps nothing, has no command line.
alive() { # alive DAEMON
  pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "--conf $dir/ceph.conf "
}

daemons() { (cd "$dir/run" 2>/dev/null && for file in *.pid; do [ ! -e "$file" ] || echo "${file%.pid}"; done); }

any_alive() {
  for daemon in $(daemons); do ! alive "$daemon" || return 0; done
  return 1
}

# In the foreground of a session of its own: so the pid is known from its first moment on, and Ctrl-C is not for it.
start() { # start DAEMON, which is TYPE.ID
  local name=$1 program=ceph-${1%%.*}
  case $name in client.*) program=radosgw ;; esac
  setsid "$program" --conf "$dir/ceph.conf" -f -n "$name" </dev/null >>"$dir/log/$name.log" 2>&1 &
  echo $! >"$dir/run/$name.pid"
  disown
  # For its first moments the new process is a copy of this shell, which does not look like the daemon.
  for ((tries = 0; tries < 100; tries++)); do ! alive "$name" || break; sleep 0.002; done
}

# Stopped daemons (tests stop them) take a signal only when they go on, except SIGKILL.
stop_all() {
  for daemon in $(daemons); do ! alive "$daemon" || { kill -TERM "$pid"; kill -CONT "$pid"; } 2>/dev/null || true; done
  for ((tenths = 0; tenths < 100; tenths++)); do
    any_alive || return 0
    if [ "$tenths" = 20 ]; then
      for daemon in $(daemons); do ! alive "$daemon" || kill -KILL "$pid" 2>/dev/null || true; done
    fi
    sleep 0.1
  done
  die "daemons below $dir do not end"
}

remove() {
  # Removing would walk into a mount, and hang in one whose cluster is gone.
  ! grep -qF " $dir/" /proc/self/mounts || die "something is mounted below $dir: unmount it first"
  stop_all
  rm -rf "$dir"
}

left() { # seconds until the deadline
  echo $((deadline > SECONDS ? deadline - SECONDS : 1))
}

ceph() { timeout -k 1 "$(left)" ceph --conf "$dir/ceph.conf" "$@"; }

check() { # nothing comes up once a daemon has ended, or the time is over
  for daemon in $(daemons); do alive "$daemon" || die "$daemon has ended"; done
  [ "$SECONDS" -lt "$deadline" ] || die "not up after $deadline s"
}

listens() { (exec 3<>"/dev/tcp/$host/$1") 2>/dev/null; }

configure() { # configure FSID PORT
  # Loading a module that nobody asked for is most of a manager's start. Without those listed, the cluster is not healthy.
  local modules='volumes balancer crash devicehealth orchestrator pg_autoscaler progress rbd_support status telemetry'
  local unwanted
  unwanted=$(cd /usr/share/ceph/mgr && for module in */; do
    case " $modules " in *" ${module%/} "*) ;; *) printf '%s,' "${module%/}" ;; esac
  done)
  cat <<CONF
$mark
[global]
fsid = $1
mon host = [v2:$host:$2,v1:$host:$(($2 + 1))]
public network = $host/32
# As a real cluster should be; the default of 16.2 only warns.
auth allow insecure global id reclaim = false
keyring = $dir/keyring
run dir = $dir/run
log file = $dir/log/\$name.log
admin socket = $dir/run/\$name.asok
mon data = $dir/mon
mgr data = $dir/mgr
osd data = $dir/osd
mds data = $dir/mds
# One copy in memory, on one host.
osd objectstore = memstore
memstore device bytes = ${OSD_BYTES:-4294967296}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon max pg per osd = 1000
# One monitor need not gather changes before it agrees with itself.
paxos propose interval = 0.02
paxos min wait = 0.01
mon tick interval = 1
mon osd crush smoke test = false
# A restarted MDS waits this long (45) for clients that were killed, such as a manager. Living ones are back at once.
mds reconnect timeout = 5
mgr initial modules =
mgr disabled modules = ${unwanted%,}
[client]
admin socket =
log file =
[client.rgw]
log file = $dir/log/\$name.log
admin socket = $dir/run/\$name.asok
rgw data = $dir/rgw
rgw frontends = beast endpoint=$host:$(($2 + 2))
rgw run sync thread = false
CONF
}

# The monitor takes these in as it makes its store, which saves a command for each.
keys() {
  key() { printf '[%s]\n\tkey = %s\n' "$1" "$(ceph-authtool --gen-print-key)"; shift; printf '\tcaps %s\n' "$@"; }
  key mon. 'mon = "allow *"'
  key client.admin 'mon = "allow *"' 'mgr = "allow *"' 'osd = "allow *"' 'mds = "allow *"'
  key mgr.x 'mon = "allow profile mgr"' 'osd = "allow *"' 'mds = "allow *"'
  key osd.0 'mon = "allow profile osd"' 'mgr = "allow profile osd"' 'osd = "allow *"'
  key mds.a 'mon = "allow profile mds"' 'mgr = "allow profile mds"' 'mds = "allow *"' 'osd = "allow rwx"'
  key client.rgw 'mon = "allow rw"' 'mgr = "allow rw"' 'osd = "allow rwx"'
}

failed() { # what was wrong, as far as the daemons say, and nothing left of it
  trap - EXIT INT TERM
  wait_for_helpers || true
  for daemon in $(daemons); do
    echo "== $daemon $(alive "$daemon" && echo runs || echo has ended); its log:"
    tail -n 8 "$dir/log/$daemon.log" || true
  done >&2
  cat "$dir"/log/{commands,users} >&2 2>/dev/null || true
  remove
}

has_programs() {
  local program
  for program in ceph ceph-authtool ceph-mon ceph-mgr ceph-osd ceph-mds monmaptool setsid ${RGW:+radosgw radosgw-admin}; do
    command -v "$program" >/dev/null || die "no $program; run scripts/setup.sh lab"
  done
  [ -d /usr/share/ceph/mgr/volumes ] || die "no ceph-mgr-modules-core; run scripts/setup.sh lab"
}

helpers=()
wait_for_helpers() {
  for helper in ${helpers[@]+"${helpers[@]}"}; do wait "$helper" || return; done
  helpers=()
}

up() {
  local port=$1 fsid osd
  has_programs
  if [ -e "$dir/env" ] && any_alive; then
    echo "is up already: $dir/env"
    return
  fi
  # What a cluster has left that died, with the machine say, is worth nothing: its OSD was in memory.
  [ ! -e "$dir/ceph.conf" ] || remove
  mkdir -p "$dir"
  [ -z "$(ls -A "$dir")" ] || die "$dir is not empty"
  while listens "$port" || listens $((port + 1)) || { [ -n "${RGW:-}" ] && listens $((port + 2)); }; do port=$((port + 3)); done

  SECONDS=0
  echo "$mark" >"$dir/ceph.conf"
  trap failed EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  mkdir "$dir"/{mon,mgr,osd,mds,rgw,run,log}
  fsid=$(cat /proc/sys/kernel/random/uuid)
  osd=$(cat /proc/sys/kernel/random/uuid)
  configure "$fsid" "$port" >"$dir/ceph.conf"
  keys >"$dir/keyring"
  monmaptool --create --fsid "$fsid" --addv a "[v2:$host:$port,v1:$host:$((port + 1))]" "$dir/monmap" >/dev/null
  ceph-mon --conf "$dir/ceph.conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
  start mon.a
  until listens "$port"; do check; sleep 0.01; done

  start mgr.x
  start mds.a
  "$deploy/users.sh" cephfs csi --conf "$dir/ceph.conf" --connect-timeout "$(left)" >"$dir/users" 2>"$dir/log/users" &
  helpers+=($!)
  # One process for all commands, since each start of `ceph` takes longer than what it does.
  ceph >"$dir/log/commands" 2>&1 <<COMMANDS
osd new $osd
osd pool create cephfs.meta
osd pool create cephfs.data
osd pool create cephfs.bulk
fs new cephfs cephfs.meta cephfs.data
fs add_data_pool cephfs cephfs.bulk
COMMANDS
  ! grep -q '^Error' "$dir/log/commands" || die "ceph refused a command"
  timeout -k 1 "$(left)" ceph-osd --conf "$dir/ceph.conf" -i 0 --mkfs --osd-uuid "$osd" >>"$dir/log/osd.0.log" 2>&1
  start osd.0
  # Answered by the manager, which asks the MDS, which asks the OSD.
  until ceph fs subvolumegroup ls cephfs >/dev/null 2>&1; do check; sleep 0.02; done
  wait_for_helpers || die "cannot make the users"
  [ -z "${RGW:-}" ] || rgw "$port"
  environment "$fsid" "$port" >"$dir/env.new"
  mv "$dir/env.new" "$dir/env"
  trap - EXIT INT TERM
  echo "up: $dir/env"
}

rgw() { # rgw PORT
  start client.rgw
  until listens $(($1 + 2)); do check; sleep 0.1; done
  timeout -k 1 "$(left)" radosgw-admin --conf "$dir/ceph.conf" user create --uid=berth --display-name=berth \
    --access-key=berth --secret-key=berthsecret >"$dir/log/commands" 2>&1
}

environment() { # environment FSID PORT
  local user key
  cat <<ENV
export BERTH_LAB_DIR=$dir
export BERTH_LAB_CONF=$dir/ceph.conf
export BERTH_LAB_FSID=$1
export BERTH_LAB_MONITORS=v2:$host:$2,v1:$host:$(($2 + 1))
export BERTH_LAB_ADMIN_KEY=$(ceph-authtool -p "$dir/keyring" -n client.admin)
ENV
  while read -r user key; do
    echo "$key" >"$dir/${user#berth-}.key"
    echo "export BERTH_LAB_$(tr a-z A-Z <<<"${user#berth-}")_USER=$user"
    echo "export BERTH_LAB_$(tr a-z A-Z <<<"${user#berth-}")_KEY=$key"
  done <"$dir/users"
  [ -z "${RGW:-}" ] || cat <<ENV
export BERTH_LAB_S3_ENDPOINT=http://$host:$(($2 + 2))
export BERTH_LAB_S3_ACCESS_KEY=berth
export BERTH_LAB_S3_SECRET_KEY=berthsecret
ENV
}

usage() { sed -n 's/^# \{2,\}\(lab.sh\)/  \1/p' "$0" >&2; exit 2; }
[ "${1:-}" != check ] || { has_programs; exit; }
[ $# -ge 2 ] || usage
dir=$(realpath -m "$2")
# It is written into files that quote nothing.
case $dir in / | *[!A-Za-z0-9._/+@=-]*) die "cannot use the folder $dir" ;; esac
case $1 in
  up) up "${3:-40000}" ;;
  down)
    [ -e "$dir" ] || exit 0
    grep -qsxF "$mark" "$dir/ceph.conf" || rmdir "$dir" 2>/dev/null || die "$dir has no cluster of lab.sh"
    [ ! -e "$dir" ] || remove
    ;;
  restart)
    case ${3:-} in
      mon) daemon=mon.a ;;
      mgr) daemon=mgr.x ;;
      mds) daemon=mds.a ;;
      osd) die "the OSD keeps its data in memory: it can't be restarted" ;;
      *) usage ;;
    esac
    [ -e "$dir/env" ] || die "no cluster is below $dir"
    ! alive "$daemon" || kill -KILL "$pid"
    while alive "$daemon"; do sleep 0.01; done
    start "$daemon"
    ;;
  *) usage ;;
esac
