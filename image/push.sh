#!/usr/bin/env bash
# Pushes an image and names its digest, by which to run it: make image-push IMAGE=registry/name:tag.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${IMAGE:-} == */* ]] ||
  { echo "error: IMAGE=${IMAGE:-}: give registry/name:tag; TAG= of make image names it so" >&2
    exit 64; }
# shellcheck source=image/engine.sh
. image/engine.sh
"$engine" push "$IMAGE"
echo "pushed $("$engine" image inspect --format '{{index .RepoDigests 0}}' "$IMAGE")"
