# shellcheck shell=bash
# Finds the container engine: docker or podman, whichever answers; RUNTIME=docker|podman says which.
# To be sourced, in the repository; sets `engine`. A docker command may be a client whose daemon
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
