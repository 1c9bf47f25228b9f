#!/bin/sh
# Resolves *.in into *.lock with hashes, for Python 3.11 and newer on Linux x86-64: make lock.
# Needs uv on PATH or in .venv.
set -eu
cd "$(dirname "$0")"
uv=$(command -v uv || echo "../.venv/bin/uv")
lock() {
  "$uv" pip compile --quiet --no-header --generate-hashes --universal --python-version 3.11 "$@"
}
lock cpu.in --override overrides.txt --override cpu-overrides.txt --output-file cpu.lock
# What was run on a CPU is what runs on a GPU: cuda.lock has the versions of cpu.lock, but for vLLM.
pins=cpu.pins
trap 'rm -f "$pins"' EXIT
sed -n '/never/d; s/^\([a-z].*==.*\) \\$/\1/p' cpu.lock > "$pins"
lock cuda.in --override overrides.txt --constraint "$pins" --output-file cuda.lock
lock dev.in --override dev-overrides.txt --output-file dev.lock
lock filters.in --output-file filters.lock
lock quantize.in --no-deps --output-file quantize.lock
printf 'uv==%s\n' "$(sed -n 's/^uv==//p' dev.in)" | lock - --output-file uv.lock
