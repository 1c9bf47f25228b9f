#!/usr/bin/env bash
# Says on one page what an image holds, from inside it: make image-check IMAGE=torch-relay:cuda.
# LINE=0 leaves the five stages with the debug model out (three minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=image/engine.sh
. image/engine.sh
check_image
ours=$(sha256sum < "requirements/$accelerator.lock")
[ "$(label lock)" = "${ours%% *}" ] ||
  echo "warning: $image was built from another $accelerator.lock ($(label lock)) than this" \
    "checkout's (${ours%% *}); make image builds it anew" >&2
gpus=()
if [ -e /dev/nvidiactl ]; then
  case $engine in
    podman) gpus=(--device nvidia.com/gpu=all) ;;
    docker) gpus=(--gpus all) ;;
  esac
fi
"$engine" run --rm --network host --shm-size 16g "${gpus[@]}" --env "EFA=$(label efa)" \
  --env "ACCELERATOR=$accelerator" --env "LINE=${LINE:-1}" "$image" \
  python3 -m scripts.tools.image_check
