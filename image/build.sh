#!/usr/bin/env bash
# Builds the image: make image.
#   ACCELERATOR=cuda|cpu   which lock (default cuda)
#   BASE_IMAGE=            default: of versions.env; any Debian or Ubuntu with Python 3.11 or newer
#   EFA=none|version       default: of versions.env with cuda, none with cpu
#   TAG=torch-relay:cuda   its name
#   WHEELS=folder          install from these wheels, without a package index
#   TORCH_CPU=1            with cpu: torch's smaller CPU build (requirements/install.sh)
#   DRY_RUN=1              print the command
set -euo pipefail
cd "$(dirname "$0")/.."
. ./versions.env
accelerator=${ACCELERATOR:-cuda}
case $accelerator in
  cuda) base=$CUDA_BASE_IMAGE@$CUDA_BASE_DIGEST efa=${EFA:-$EFA_INSTALLER_VERSION} ;;
  cpu) base=$CPU_BASE_IMAGE efa=${EFA:-none} ;;
  *) echo "error: ACCELERATOR=$accelerator: cuda or cpu" >&2; exit 64 ;;
esac
[ "$efa" = none ] || [[ $efa =~ ^[0-9]+(\.[0-9]+)+$ ]] || {
  echo "error: EFA=$efa: none, or a version of the installer, as $EFA_INSTALLER_VERSION" >&2
  exit 64
}
lock=$(sha256sum < "requirements/$accelerator.lock")
# A base of another version, or a checksum of another installer, is the user's to give.
arguments=(
  "BASE_IMAGE=${BASE_IMAGE:-$base}" "ACCELERATOR=$accelerator" "EFA_INSTALLER_VERSION=$efa"
  "EFA_INSTALLER_SHA256=$EFA_INSTALLER_SHA256" "LOCK_SHA256=${lock%% *}"
  "REVISION=$(git describe --always --dirty --abbrev=40 2> /dev/null || true)"
  "SOURCE=$(git remote get-url origin 2> /dev/null | sed 's#//[^/@]*@#//#' || true)"
)
[ -z "${TORCH_CPU:-}" ] || [ "$accelerator" = cpu ] ||
  { echo "error: TORCH_CPU=1: with ACCELERATOR=cpu alone" >&2; exit 64; }
[ -z "${TORCH_CPU:-}" ] || arguments+=("TORCH_CPU=1" "TORCH_INDEX=${TORCH_INDEX:-}")
words=(build --tag "${TAG:-torch-relay:$accelerator}")
for argument in "${arguments[@]}"; do words+=(--build-arg "$argument"); done
if [ -n "${WHEELS:-}" ]; then
  compgen -G "$WHEELS/*.whl" > /dev/null ||
    { echo "error: WHEELS=$WHEELS: no wheels there" >&2; exit 64; }
  words+=(--build-context "wheels=$WHEELS")
fi
# A proxy's certificate, where this shell needs one to reach the package index.
[ -z "${SSL_CERT_FILE:-}" ] || words+=(--secret "id=ca_bundle,src=$SSL_CERT_FILE")
if [ -n "${DRY_RUN:-}" ] && [ "$DRY_RUN" != 0 ]; then
  printf '%q ' "${RUNTIME:-docker}" "${words[@]}" .
  echo
  exit
fi
# shellcheck source=image/engine.sh
. image/engine.sh
DOCKER_BUILDKIT=1 "$engine" "${words[@]}" . || {
  code=$?
  for field in .Store.GraphRoot .DockerRootDir; do # podman's name, docker's
    root=$("$engine" info --format "{{$field}}" 2> /dev/null) && break || root=/
  done
  free=$(df --output=avail --block-size=G "$root" 2> /dev/null | tail -n 1 | tr -dc 0-9)
  why="the last lines above say why"
  [ "${free:-99}" -ge 20 ] || why="$free GB free in $root, and 20 GB are needed for a while"
  echo "error: not built: $why" >&2
  exit "$code"
}
tag=${TAG:-torch-relay:$accelerator}
echo "built $tag; make image-check IMAGE=$tag"
