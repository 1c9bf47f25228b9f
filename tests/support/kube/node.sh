#!/usr/bin/env bash
# One node of tests/support/kube_lab.py's cluster: containerd, kubelet, kube-proxy, pretended GPUs.
#   node.sh node R I        first process of node I's namespaces
#   node.sh kubelet R I     node I's kubelet alone
set -euo pipefail
what=$1 R=$2 I=$3 N=$2/node$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/support/kube/common.sh
. "$here/common.sh"

# Private copies of the places that a node's programs write to unasked: the host's stay as they are.
own_folders() {
  local file
  mount -t tmpfs lab /run
  mount -t tmpfs lab /var/log
  mkdir -p /run/netns /run/var/up /run/var/work
  mount -t overlay -o "lowerdir=/var/lib,upperdir=/run/var/up,workdir=/run/var/work" lab /var/lib
  # The cluster's name server, so that the pull of an image that is not there fails at once.
  file=$(readlink -m /etc/resolv.conf)
  echo "nameserver 10.99.0.1" > "$N/resolv.conf"
  case $file in /run/*) mkdir -p "${file%/*}" && touch "$file" ;; esac
  [ ! -e "$file" ] || mount --bind "$N/resolv.conf" "$file"
}

# The kubelet sets these kernel-wide values if they differ: show it files that hold them.
own_sysctls() {
  local setting file
  mkdir -p "$N/sysctl"
  for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=$N/sysctl/$(basename "${setting%=*}")
    echo "${setting#*=}" > "$file"
    [ ! -e "/proc/sys/${setting%=*}" ] || mount --bind "$file" "/proc/sys/${setting%=*}"
  done
  sysctl -qw net.ipv4.ip_forward=1
  sysctl -qw net.bridge.bridge-nf-call-iptables=1 || true
}

# A cgroup of the node's own in every hierarchy; version 1 needs its cpuset filled in by hand.
own_cgroups() {
  local root folder all=(/sys/fs/cgroup)
  [ -e /sys/fs/cgroup/cgroup.controllers ] || all=(/sys/fs/cgroup/*/)
  for root in "${all[@]}"; do
    root=${root%/}
    mkdir -p "$root/$ID/node$I" 2> /dev/null || continue
    if [ -e "$root/cpuset.mems" ]; then
      for folder in "$root/$ID" "$root/$ID/node$I"; do
        cat "$root/cpuset.cpus" > "$folder/cpuset.cpus"
        cat "$root/cpuset.mems" > "$folder/cpuset.mems"
      done
    fi
  done
}

node() {
  local archive store=(ctr -a "$N/containerd.sock" -n k8s.io images)
  own_folders
  hostname "node$I"
  own_sysctls
  ip link del cni0 2> /dev/null || true # left from before a power cut
  rm -rf "$N/state" "$N/cni" "$N/containerd.sock"
  own_cgroups
  containerd_conf
  bg "node$I-containerd" containerd -c "$N/containerd.toml"
  until ctr -a "$N/containerd.sock" version > /dev/null 2>&1; do
    kill -0 "$LAST" 2> /dev/null || die "containerd ended: $(last_words "node$I-containerd")"
    sleep 0.1
  done
  since containerd ready
  for archive in "$B"/img/*.tar ${IMAGES[@]+"${IMAGES[@]}"}; do
    "${store[@]}" import "$archive" >> "$R/log/node$I-import.log" 2>&1 ||
      echo "import of $archive failed"
  done
  since images imported
  kubelet_conf
  kubelet
  cat > "$N/proxy.yaml" << K
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: "$R/kube-proxy.conf"}
mode: nftables
clusterCIDR: 10.244.0.0/16
hostnameOverride: node$I
oomScoreAdj: 0
nftables: {syncPeriod: 30s, minSyncPeriod: 100ms}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
K
  bg "node$I-kube-proxy" kube-proxy --config "$N/proxy.yaml"
  [ -z "$NETPOL" ] || netpol
  [ "$GPUS" = 0 ] ||
    bg "node$I-gpus" labd gpus /var/lib/kubelet/device-plugins nvidia.com/gpu "$GPUS"
  since kubelet started
  while :; do sleep 1000 & wait $! || true; done
}

containerd_conf() {
  local class runtimes='' cri='plugins."io.containerd.cri.v1.runtime"'
  mkdir -p "$N/net.d"
  cat > "$N/net.d/10-lab.conflist" << K
{"cniVersion":"1.0.0","name":"lab","plugins":[
 {"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":false,"hairpinMode":true,
  "ipam":{"type":"host-local","dataDir":"$N/cni","ranges":[[{"subnet":"10.244.$I.0/24"}]],
          "routes":[{"dst":"0.0.0.0/0"}]}}]}
K
  # RuntimeClass "host": a container is given the host's /usr and more, read-only.
  ctr oci spec | python3 -c '
import json, os, sys
spec = json.load(sys.stdin)
for d in ["/usr", "/etc/alternatives", "/etc/ssl", "/etc/ld.so.cache"] + sys.argv[1:]:
    source, _, there = d.partition(":")
    if os.path.exists(source):
        mount = {"destination": there or source, "source": source}
        spec["mounts"].append({**mount, "type": "bind", "options": ["rbind", "ro"]})
spec["process"]["rlimits"] = []
json.dump(spec, sys.stdout)' ${MOUNTS[@]+"${MOUNTS[@]}"} > "$N/host-spec.json"
  for class in plain host; do
    runtimes+="
    [$cri.containerd.runtimes.$class]
      runtime_type = \"io.containerd.runc.v2\"
      runtime_path = \"$B/bin/containerd-shim-runc-v2\"
      $([ $class = plain ] || echo "base_runtime_spec = \"$N/host-spec.json\"")
      [$cri.containerd.runtimes.$class.options]
        BinaryName = \"$B/debian/usr/sbin/runc\"
        Root = \"$N/state/runc\""
  done
  cat > "$N/containerd.toml" << K
version = 3
root = "$N/containerd"
state = "$N/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.differ.v1.erofs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "$N/containerd.sock"
[ttrpc]
  address = "$N/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "localhost/pause:1"
[$cri]
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [$cri.cni]
    bin_dirs = ["$B/debian/usr/lib/cni"]
    conf_dir = "$N/net.d"
  [$cri.containerd]
    default_runtime_name = "$RUNTIME"
$runtimes
K
}

kubelet_conf() {
  cat > "$N/kubelet.yaml" << K
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true, cacheTTL: 5s}
  x509: {clientCAFile: "$R/pki/ca.crt"}
authorization: {mode: Webhook}
containerRuntimeEndpoint: "unix://$N/containerd.sock"
cgroupDriver: cgroupfs
cgroupRoot: /$ID/node$I
enforceNodeAllocatable: [pods]
clusterDNS: [10.99.0.1]
clusterDomain: cluster.local
resolvConf: "$N/resolv.conf"
podLogsDir: "$N/logs"
volumePluginDir: "$N/volume-plugins"
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
nodeStatusUpdateFrequency: 2s
nodeStatusReportFrequency: 10s
nodeLeaseDurationSeconds: 6
syncFrequency: 10s
fileCheckFrequency: 0s
maxPods: 60
podPidsLimit: -1
shutdownGracePeriod: 0s
serializeImagePulls: false
K
}

kubelet() {
  bg "node$I-kubelet" "$B/bin/kubelet" --config "$N/kubelet.yaml" --kubeconfig "$R/node$I.conf" \
    --root-dir "$N/kubelet" --cert-dir "$N/kubelet-pki" --hostname-override "node$I" \
    --node-ip "10.99.0.$((10 + I))" --node-labels "lab.local/node=node$I"
  echo "$LAST" > "$N/kubelet.pid"
}

# NetworkPolicy: the real controller decides on each new connection through a queue. Kernels
# without nft's "queue" cannot take its own rules (it logs that and goes on), so an iptables rule of
# ours feeds the queue. It expects to run in a pod: give it a pod's files.
netpol() {
  local pod=/run/secrets/kubernetes.io/serviceaccount
  mkdir -p $pod
  cp "$R/pki/ca.crt" $pod/ca.crt
  sed -n 's/.*token: \([0-9a-f]*\).*/\1/p' "$ADMIN" > $pod/token
  export XTABLES_LIBDIR
  XTABLES_LIBDIR=$(echo "$B"/debian/usr/lib/*/xtables)
  iptables-legacy -t mangle -F FORWARD # left from before a power cut
  iptables-legacy -t mangle -A FORWARD -m conntrack --ctstate NEW -j NFQUEUE --queue-num 100 \
    --queue-bypass
  KUBERNETES_SERVICE_HOST=10.99.0.1 KUBERNETES_SERVICE_PORT=6443 \
    bg "node$I-netpol" "$B/addons/netpol/kube-network-policies" --hostname-override "node$I" \
    --disable-nri --netfilter-bug-1766-fix=false --metrics-bind-address 127.0.0.1:9080 -v 2
}

"$what"
