# shellcheck shell=bash
# Finds the container engine: docker or podman, whichever answers; RUNTIME=docker|podman says which.
# To be sourced, in the repository; sets `engine`, and `image`: IMAGE, or the one for this machine,
# as stages take it (scripts/clusters/containers.py). A docker command may be a client whose daemon
# does not run, so each is asked.
engine="" said=""
for name in ${RUNTIME:-docker podman}; do
  if ! command -v "$name" > /dev/null; then
    said+="$name: not on PATH; "
  elif answer=$(timeout 30 "$name" info 2>&1); then
    engine=$name
    break
  else
    said+="$name info: $(tail -n 1 <<< "$answer"); "
  fi
done
if [ -z "$engine" ]; then
  echo "error: no container engine answers: ${said%; }. Install podman, start docker, or say" \
    "which with RUNTIME=" >&2
  exit 64
fi
image=${IMAGE:-torch-relay:cpu}
[ -n "${IMAGE:-}" ] || [ ! -e /dev/nvidiactl ] || image=torch-relay:cuda
label() { "$engine" image inspect --format "{{index .Config.Labels \"torch-relay.$1\"}}" "$image"; }
check_image() { # sets `accelerator`
  accelerator=$(label accelerator 2> /dev/null) || accelerator=""
  [[ $accelerator =~ ^(cpu|cuda)$ ]] || {
    echo "error: IMAGE=$image: $engine has no image of make image by that name; make image" \
      "ACCELERATOR=${image##*:}, or IMAGE=" >&2
    exit 64
  }
}
