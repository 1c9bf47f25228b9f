#!/bin/sh
# Makes .venv from the hash-locked files; make and the image run it. Safe to interrupt and to
# repeat: the mark is written last, and every step finishes what an earlier one left.
#   ACCELERATOR=cpu|cuda   which lock; default: cuda where there is a driver of NVIDIA's
#   LOCKS="…"              what to install, for the image; default: that lock and dev.lock
#   TORCH_CPU=1            with cpu: take torch's smaller CPU build from TORCH_INDEX instead of the
#                          CUDA build (not hash-locked)
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

. ./versions.env
enough="sys.version_info[:2] >= tuple(map(int, '$PYTHON_MINIMUM'.split('.')))"
"$python" -c "import sys, venv; sys.exit(not $enough)" 2>/dev/null || {
  echo "error: $python is $("$python" --version 2>&1 || true); Python $PYTHON_MINIMUM or newer" \
    "with venv is needed: PYTHON=python$PYTHON_MINIMUM make …" >&2
  exit 64
}
why="as ACCELERATOR says"
if [ -z "${ACCELERATOR:-}" ]; then
  ACCELERATOR=cpu why="no driver of NVIDIA's here"
  if [ -e /proc/driver/nvidia/version ]; then
    ACCELERATOR=cuda why="a driver of NVIDIA's is here"
  fi
fi
case $ACCELERATOR in cpu | cuda) ;; *)
  echo "error: ACCELERATOR=$ACCELERATOR: cpu or cuda" >&2
  exit 64 ;;
esac
locks=${LOCKS:-requirements/$ACCELERATOR.lock requirements/dev.lock}
if [ ! -e .venv/installed ]; then
  echo "Installing .venv for ACCELERATOR=$ACCELERATOR ($why) from $locks, once: 3.4 GB or more to" \
    "download, 7 GB or more on disk, two or three minutes on a fast line."
fi
rm -f .venv/installed
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m uv --version >/dev/null 2>&1 ||
  .venv/bin/python -m pip install --quiet --require-hashes --requirement requirements/uv.lock
sync() {
  .venv/bin/python -m uv pip sync --quiet --compile-bytecode --require-hashes "$@"
}
if [ -n "${TORCH_CPU:-}" ] && [ "$ACCELERATOR" = cpu ]; then
  # Everything but torch and the CUDA libraries by hash, then torch's CPU build of the same version.
  awk '/^[a-z]/ { skip = /^(torch==|nvidia-|cuda-)/ } !skip' requirements/cpu.lock \
    > .venv/cpu-without-torch.lock
  # shellcheck disable=SC2086 # words
  sync .venv/cpu-without-torch.lock ${locks#requirements/cpu.lock}
  torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements/cpu.lock)
  .venv/bin/python -m uv pip install --quiet --no-deps --index-url "$index" "$torch"
else
  # shellcheck disable=SC2086 # words
  sync $locks
fi
echo "$ACCELERATOR" > .venv/installed
