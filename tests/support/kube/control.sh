#!/usr/bin/env bash
# The inside of tests/support/kube_lab.py's cluster, which starts it; nobody else needs to.
#   control.sh up R         first process of the cluster's namespaces: network, control plane, nodes
#   control.sh boot R I     start node I (from the control plane's namespaces)
set -euo pipefail
what=$1 R=$2 I=${3:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/support/kube/common.sh
. "$here/common.sh"
K=("$B/bin/kubectl" --kubeconfig "$ADMIN")

conf() { # conf NAME TOKEN: a kubeconfig
  local ca
  ca=$(base64 -w0 "$R/pki/ca.crt")
  cat > "$R/$1.conf" << K
apiVersion: v1
kind: Config
clusters:
- name: lab
  cluster: {server: "https://10.99.0.1:6443", certificate-authority-data: "$ca"}
users: [{name: $1, user: {token: $2}}]
contexts: [{name: lab, context: {cluster: lab, user: $1}}]
current-context: lab
K
  chmod 600 "$R/$1.conf"
}

cert() { # cert FILE SUBJECT EXTENSIONS
  openssl req "${ec[@]}" -subj "$2" -keyout "$1.key" -out "$1.csr" 2> /dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 \
    -extfile <(echo "$3") -out "$1.crt" 2> /dev/null
}

pki() {
  local i name names token users ec=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  mkdir -p "$R/pki"
  cd "$R/pki"
  openssl req -x509 "${ec[@]}" -days 3650 -subj /CN=lab-ca -keyout ca.key -out ca.crt 2> /dev/null
  names=$(printf ',DNS:%s' localhost kubernetes kubernetes.default kubernetes.default.svc \
    kubernetes.default.svc.cluster.local)
  cert apiserver /CN=kube-apiserver \
    "subjectAltName=IP:10.99.0.1,IP:127.0.0.1,IP:10.96.0.1$names"
  cert kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client \
    "extendedKeyUsage=clientAuth"
  cert front-proxy /CN=front-proxy "extendedKeyUsage=clientAuth"
  openssl genrsa -out sa.key 2048 2> /dev/null
  users=(admin system:kube-{controller-manager,scheduler,proxy})
  for ((i = 1; i <= NODES; i++)); do users+=("node$i"); done
  : > tokens.csv
  for name in "${users[@]}"; do
    token=$(openssl rand -hex 16)
    case $name in
      admin) echo "$token,admin,admin,system:masters" >> tokens.csv ;;
      node*) echo "$token,system:node:$name,$name,system:nodes" >> tokens.csv ;;
      *) echo "$token,$name,$name" >> tokens.csv ;;
    esac
    conf "${name#system:}" "$token"
  done
  cd "$R"
}

# Clocks are short, for tests: a dead node is NotReady after 8 s, its pods are given up 5 s later.
control_plane() {
  local P=$R/pki C=$R/kube-controller-manager.conf etcd=http://127.0.0.1:2379
  local peer=http://127.0.0.1:2380
  bg etcd etcd --data-dir "$R/etcd" --unsafe-no-fsync --listen-client-urls $etcd \
    --advertise-client-urls $etcd --listen-peer-urls $peer --initial-advertise-peer-urls $peer \
    --initial-cluster default=$peer
  # --enable-aggregator-routing: there is no kube-proxy here; webhooks are reached by pod IP.
  bg kube-apiserver kube-apiserver --etcd-servers $etcd --bind-address 10.99.0.1 \
    --advertise-address 10.99.0.1 --enable-aggregator-routing \
    --tls-cert-file "$P/apiserver.crt" --tls-private-key-file "$P/apiserver.key" \
    --client-ca-file "$P/ca.crt" --token-auth-file "$P/tokens.csv" --authorization-mode Node,RBAC \
    --enable-admission-plugins NodeRestriction --service-cluster-ip-range 10.96.0.0/16 \
    --allow-privileged \
    --service-account-issuer https://kubernetes.default.svc.cluster.local \
    --service-account-key-file "$P/sa.key" --service-account-signing-key-file "$P/sa.key" \
    --kubelet-client-certificate "$P/kubelet-client.crt" \
    --kubelet-client-key "$P/kubelet-client.key" \
    --kubelet-preferred-address-types InternalIP \
    --requestheader-client-ca-file "$P/ca.crt" --requestheader-allowed-names front-proxy \
    --requestheader-username-headers X-Remote-User \
    --requestheader-group-headers X-Remote-Group \
    --requestheader-extra-headers-prefix X-Remote-Extra- \
    --proxy-client-cert-file "$P/front-proxy.crt" --proxy-client-key-file "$P/front-proxy.key" \
    --default-not-ready-toleration-seconds 5 --default-unreachable-toleration-seconds 5
  until "${K[@]}" get --raw /readyz > /dev/null 2>&1; do
    kill -0 "$LAST" 2> /dev/null || die "the API server ended: $(last_words kube-apiserver)"
    sleep 0.1
  done
  since API server ready
  echo ready > "$R/api"
  bg kube-controller-manager kube-controller-manager --kubeconfig "$C" \
    --authentication-kubeconfig "$C" --authorization-kubeconfig "$C" \
    --service-account-private-key-file "$P/sa.key" --root-ca-file "$P/ca.crt" \
    --cluster-signing-cert-file "$P/ca.crt" --cluster-signing-key-file "$P/ca.key" \
    --leader-elect=false --use-service-account-credentials --node-monitor-period 1s \
    --node-monitor-grace-period 8s --node-eviction-rate 10
  bg kube-scheduler kube-scheduler --kubeconfig "$R/kube-scheduler.conf" --leader-elect=false
  cat > "$R/Corefile" << K
.:53 {
  errors
  ready 127.0.0.1:8181
  kubernetes cluster.local in-addr.arpa {
    kubeconfig "$ADMIN"
    pods verified
    ttl 1
  }
}
K
  bg coredns coredns -conf "$R/Corefile"
  bg volumes labd volumes "$ADMIN" "$R/volumes"
}

network() { # network I: node I's own, a link to the others, and the ways to their pods
  local j inside=(nsenter --net="/run/netns/node$1")
  ip netns add "node$1"
  ip link add "ve$1" type veth peer name eth0 netns "node$1"
  ip link set "ve$1" up master lab0
  ip route add "10.244.$1.0/24" via "10.99.0.$((10 + $1))"
  "${inside[@]}" sh -ec "ip link set lo up; ip addr add 10.99.0.$((10 + $1))/24 dev eth0
    ip link set eth0 up; ip route add default via 10.99.0.1
    ip route add unreachable 169.254.0.0/16"
  for ((j = 1; j <= NODES; j++)); do
    [ "$1" = "$j" ] || "${inside[@]}" ip route add "10.244.$j.0/24" via "10.99.0.$((10 + j))"
  done
}

up() {
  local i
  mount -t tmpfs lab /run
  mkdir /run/netns
  ip link set lo up
  ip link add lab0 type bridge
  ip addr add 10.99.0.1/24 dev lab0
  ip link set lab0 up
  sysctl -qw net.ipv4.ip_forward=1
  mkdir -p "$R/log" "$R/volumes"
  chmod 755 "$R/volumes"
  pki
  control_plane
  for ((i = 1; i <= NODES; i++)); do
    network "$i"
    boot "$i"
  done
  "${K[@]}" apply -f - << K
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: shared, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: lab.local/dir
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: host}
handler: host
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: plain}
handler: plain
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: lab:kube-proxy}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:node-proxier}
subjects: [{kind: User, name: system:kube-proxy, apiGroup: rbac.authorization.k8s.io}]
K
  for ((i = 1; i <= NODES; i++)); do
    until ready "node$i"; do
      [ $(($(date +%s%3N) - T0)) -lt 240000 ] || die "node$i is not ready after 240 s"
      sleep 0.2
    done
    since "node$i ready"
  done
  # Until it is there a pod is refused.
  until "${K[@]}" get serviceaccount default > /dev/null 2>&1; do sleep 0.1; done
  echo ready > "$R/up"
  while :; do sleep 1000 & wait $! || true; done # bash as first process also collects orphans
}

ready() { # node $1 is Ready and offers its pretended GPUs
  local told
  told=$("${K[@]}" get node "$1" -o yaml 2> /dev/null) || return 1
  [[ $told = *"reason: KubeletReady"* ]] &&
    [[ $GPUS = 0 || $told = *"nvidia.com/gpu: \"$GPUS\""* ]]
}

boot() {
  mkdir -p "$R/node$1"
  nsenter --net="/run/netns/node$1" unshare --mount --pid --uts --fork --kill-child --mount-proc \
    bash "$here/node.sh" node "$R" "$1" < /dev/null >> "$R/log/node$1.log" 2>&1 &
  echo $! > "$R/node$1/pid"
}

"$what" ${I:+"$I"}
