#!/usr/bin/env bash
# Writes the image as one file that Slurm's containers start, without a registry:
#   make squashfs   torch-relay.sqsh for pyxis and enroot      IMAGE=torch-relay:cuda OUT=file
#   make sif        torch-relay.sif for apptainer
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
out=${OUT:-torch-relay.$kind}
[ ! -d "$out" ] || out=${out%/}/torch-relay.$kind # a folder that is there
needs() { command -v "$1" > /dev/null || { echo "error: $1: not on PATH; $2" >&2; exit 64; }; }
# shellcheck source=image/engine.sh
. image/engine.sh
check_image
[ -w "$(dirname "$out")" ] ||
  { echo "error: OUT=$out: its folder is not there, or cannot be written" >&2; exit 64; }
scratch=$(mktemp -d "$out.XXXX") # beside it, so that the last step is a rename
trap 'rm -rf "$scratch"' EXIT
trap 'exit 143' HUP INT TERM # by EXIT: a killed export leaves no scratch
case $kind in
  sqsh)
    needs mksquashfs "install squashfs-tools 4.5 or newer"
    container=$("$engine" create "$image" true)
    trap '"$engine" rm "$container" > /dev/null; rm -rf "$scratch"' EXIT
    # An export loses the image's variables. enroot reads them from /etc/environment.
    "$engine" image inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$image" \
      > "$scratch/environment"
    "$engine" cp "$scratch/environment" "$container:/etc/environment"
    # No plain pipe: podman waits for ever where mksquashfs has died, of a full disk for example.
    mkfifo "$scratch/tar"
    "$engine" export "$container" > "$scratch/tar" &
    export=$!
    mksquashfs - "$scratch/image" -tar -quiet -no-progress -comp zstd -Xcompression-level 3 \
      < "$scratch/tar" || { kill "$export" 2> /dev/null; exit 1; }
    wait "$export" ;; # one that broke off leaves a file that looks whole
  sif)
    needs apptainer "https://apptainer.org has packages"
    "$engine" save --output "$scratch/archive" "$image"
    apptainer build "$scratch/image" "docker-archive:$scratch/archive" ;;
esac
mv "$scratch/image" "$out"
echo "wrote $out ($(du -h "$out" | cut -f 1)): RELAY_IMAGE=$(realpath "$out") in slurm/site.env"
