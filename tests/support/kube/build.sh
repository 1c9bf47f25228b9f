#!/usr/bin/env bash
# Builds the programs of tests/support/kube_lab.py from their Go modules, and unpacks some Debian
# packages beside them. Prints the folder that holds them all, one for each version of the sources.
#   build.sh [ADDON…]   with these controllers too: jobset kueue trainer netpol
#   build.sh -k         print the folder alone
# Needs go, python3, apt-get, dpkg and 10 GB of disk: ten minutes on two cores where nothing is
# cached. Installs nothing. Once built it needs neither go nor the network.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
cache=${XDG_CACHE_HOME:-~/.cache}/torch-relay/kube
key=$({
  cat "$here"/*.go "$here/go.mod" "$here/image.py" "$here/build.sh"
  uname -m
} | sha256sum | cut -c 1-12)
out=$cache/$key
if [ "${1:-}" = -k ]; then
  echo "$out"
  exit
fi
export CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false -mod=mod" GOWORK=off
work=$out.part
say() { echo "kube: $* [$SECONDS s]" >&2; }
need() {
  command -v "$1" > /dev/null ||
    { echo "error: $1: not on PATH, and Kubernetes is not built yet in $out; $2" >&2; exit 64; }
}
build() { # build OUT PACKAGE…
  local out=$1
  shift
  go build -tags no_btrfs,no_devmapper,no_zfs,grpcnotrace -ldflags "-s -w $flags" -o "$out" "$@"
}
sources() { # sources FOLDER: go into a folder where go may write, with the module file and programs
  mkdir -p "$1"
  cp "$here"/*.go "$here"/go.* "$1"
  cd "$1"
}

base() {
  local file name minor version flags='' containerd=github.com/containerd/containerd/v2/cmd
  # runc (to build it would need cgo and libseccomp; crun does not run where cgroups of both
  # versions are mounted), CNI plugins, nft for kube-proxy, iptables-legacy for netpol, libraries.
  local packages=(runc containernetworking-plugins nftables iptables libnftables1 libnftnl11
    libmnl0 libjansson4 libxtables12 libip4tc2 libip6tc2 libnetfilter-conntrack3 libnfnetlink0
    libedit2 libbsd0 libmd0 libgmp10 libseccomp2)
  rm -rf "$work"
  mkdir -p "$work"/{bin,debian,img,deb,addons}
  [[ $(apt-cache policy runc) = *"Candidate: "[0-9]* ]] || apt-get update -qq >&2
  (cd "$work/deb" && apt-get -qq -o APT::Sandbox::User=root download "${packages[@]}" >&2)
  for file in "$work"/deb/*.deb; do dpkg -x "$file" "$work/debian"; done
  rm -rf "$work/deb" "$work/debian/usr/share"
  say "Debian packages unpacked"
  sources "$work/src"
  version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
  minor=${version#v1.} minor=${minor%%.*}
  for name in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    flags+=" -X $name.gitVersion=$version -X $name.gitMajor=1 -X $name.gitMinor=$minor"
    flags+=" -X $name.gitTreeState=clean"
  done
  say "building Kubernetes $version"
  build "$work/bin/" kube.go
  flags=''
  say "building containerd, coredns, labd, pause"
  build "$work/bin/" $containerd/containerd $containerd/ctr $containerd/containerd-shim-runc-v2
  for name in coredns labd pause; do build "$work/bin/" $name.go; done
  for name in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy \
    kubectl; do
    ln -s kube "$work/bin/$name"
  done
  python3 "$here/image.py" "$work/img/pause.tar" localhost/pause:1 "$work/bin/pause" -- /pause
  python3 "$here/image.py" "$work/img/host.tar" localhost/host:1 --skeleton
  rm -rf "$work/src" "$out"
  touch "$work/done"
  mv "$work" "$out"
  find "$cache" -mindepth 1 -maxdepth 1 -type d -mtime +30 -exec rm -rf {} + # 0.4 GB a version
  say "built"
}

# An add-on is its controller (a static program in an image of its own) and its project's own
# manifests, both from the one module.
addon() {
  local module package kustomize program=manager folder dir=$out/addons/$1 flags=''
  case $1 in
    jobset) module=sigs.k8s.io/jobset package='' kustomize=config/default ;;
    kueue) module=sigs.k8s.io/kueue package=/cmd/kueue kustomize=config/default ;;
    trainer)
      module=github.com/kubeflow/trainer/v2 package=/cmd/trainer-controller-manager
      kustomize=manifests/overlays/manager ;;
    netpol)
      module=sigs.k8s.io/kube-network-policies package=/cmd kustomize=''
      program=kube-network-policies ;;
    *) echo "error: $1: no such add-on; jobset, kueue, trainer, netpol" >&2; exit 64 ;;
  esac
  [ ! -e "$dir/done" ] || return 0
  need go "Go 1.21 or newer is on https://go.dev/dl"
  rm -rf "$dir"
  sources "$dir/src"
  case $1 in
    kueue | trainer)
      # Trainer 2.2, which Kueue imports, does not compile with 1.37's modules: one generated file
      # describes types that are gone. No controller needs it; build from a copy without it.
      go mod download github.com/kubeflow/trainer/v2
      cp -r "$(go list -m -f '{{.Dir}}' github.com/kubeflow/trainer/v2)" trainer
      chmod -R u+w trainer
      go mod edit -replace github.com/kubeflow/trainer/v2=./trainer
      rm trainer/pkg/apis/trainer/v1alpha1/zz_generated.openapi.go ;;
  esac
  say "building $1"
  go mod download "$module"
  folder=$(go list -m -f '{{.Dir}}' "$module")
  build "$dir/$program" "$module$package"
  if [ -n "$kustomize" ]; then
    python3 "$here/image.py" "$dir/image.tar" "localhost/$1:1" --user 65532 "$dir/$program" \
      -- "/$program"
    cp -r "$folder/${kustomize%%/*}" "$dir/src/"
    chmod -R u+w "$dir/src"
    # Trainer's names a release file on the web; JobSet is an add-on here.
    sed -i '/third-party/d' "$dir/src/$kustomize/kustomization.yaml"
    "$out/bin/kubectl" kustomize "$dir/src/$kustomize" 2> /dev/null |
      sed -E "s#^( *image: ).*/.*#\1localhost/$1:1#
        s#imagePullPolicy: Always#imagePullPolicy: IfNotPresent#" > "$dir/manifest.yaml"
    rm "$dir/$program"
  fi
  rm -rf "$dir/src"
  touch "$dir/done"
}

mkdir -p "$cache"
exec 9> "$cache/lock" # two at once: the second waits, then finds what the first has built
flock 9
if [ ! -e "$out/done" ]; then
  need go "Go 1.21 or newer is on https://go.dev/dl"
  for program in python3 apt-get dpkg; do need "$program" "it is needed once, for the build"; done
  base
fi
for name in "$@"; do addon "$name"; done
touch "$out" # what nobody used for a month goes with the next build
echo "$out"
