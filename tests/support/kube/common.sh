# shellcheck shell=bash disable=SC2034 # its variables are read by those two
# What control.sh and node.sh share: the settings of one cluster, PATH, and how programs start.
# Settings, written by tests/support/kube_lab.py: B (what build.sh made), R (the cluster's folder),
# ID (of its cgroups), NODES, GPUS, RUNTIME, NETPOL, and the arrays MOUNTS and IMAGES.
# shellcheck source=/dev/null
. "$R/conf"
export PATH=$B/bin:$B/debian/usr/sbin:$B/debian/usr/bin:$PATH LC_ALL=C GODEBUG=madvdontneed=1
LD_LIBRARY_PATH=$(echo "$B"/debian/usr/lib/*-linux-gnu) # nft's and runc's
export LD_LIBRARY_PATH
ADMIN=$R/admin.conf
T0=$(date +%s%3N)
bg() { # bg NAME PROGRAM…: start it; its pid is LAST, its log log/NAME.log
  local name=$1
  shift
  "$@" < /dev/null >> "$R/log/$name.log" 2>&1 &
  LAST=$!
}
since() { echo "$(($(date +%s%3N) - T0)) ms: $*"; }
die() { echo "$*"; exit 1; }
last_words() { tail -n 1 "$R/log/$1.log"; }
