#!/usr/bin/env bash
# The mechanism: every slurm/<stage>.sbatch ends in it, on the job's first node, in the repository.
#   slurm/run.sh runs/<run>/<stage>       DRY_RUN=1 shows what it would start on each node
set -euo pipefail
directory=$1 stage=$(basename "$1") job=${SLURM_JOB_ID:-0} start=${SLURM_RESTART_COUNT:-0}
# Of the shell that submitted: a stage with a RANK takes itself for a rank.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT PYTHONPATH PYTHONHOME "${!PET_@}"
set -a; . slurm/site.env >&2; set +a # what a site prints, a module's banner, is no line to paste
refuse() { echo "error: $*" >&2; exit 64; } # 64 is never retried
fact() { sed -n "s/^$1=//p" "$directory/stage.env"; }
if [ -z "${DRY_RUN:-}" ]; then
  # NodeAddr is how Slurm reaches the node, also where the node's name does not resolve.
  read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  RELAY_ADDRESS=$(scontrol -o show node "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  getent ahosts "$RELAY_ADDRESS" > /dev/null || refuse "$head: its address $RELAY_ADDRESS" \
    "does not resolve on $SLURMD_NODENAME; mend DNS, /etc/hosts, or NodeAddr in slurm.conf"
  # shellcheck disable=SC2016  # expanded on each node
  srun sh -c '[ -r "$0" ] || { echo "error: $SLURMD_NODENAME: $0 $1" >&2; exit 64; }' \
    "$(realpath -m "$directory")/stage.env" "cannot be read; is it on a filesystem that all nodes\
 share? Else choose another with RUNS=" || [ $? != 64 ] || exit 64
  nodes=$(fact NODES) gpus=$(fact GPUS) given=$SLURM_JOB_NUM_NODES
  [ "$given" = "${nodes:-1}" ] || refuse "Slurm gave $given nodes, the run wants ${nodes:-1}:" \
    "$directory/submitted.txt is the line to submit it with"
fi
# torchrun's own names. Backend, endpoint and id together: an endpoint alone means "static". A new
# id for each start: the old rendezvous is closed. A port of the job's own: two may share a node.
export RELAY_ADDRESS=${RELAY_ADDRESS:-head} RELAY_JOB=${SLURM_CLUSTER_NAME:-cluster}:$job
export PET_NNODES=${nodes:-1} PET_NPROC_PER_NODE=${gpus:-1} PET_RDZV_ID=$job-$start
export PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=$RELAY_ADDRESS:$((20000 + job % 10000))
# srun reads sbatch's SLURM_CPUS_PER_TASK no more since Slurm 22.05: a task would get one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
read -ra flags <<< "$RELAY_SRUN_FLAGS"
# --wait: when the script of one node has died, the others have a minute to say why.
launch=(srun --wait=60 --kill-on-bad-exit=0 "${flags[@]}") python=python3
runs=$(realpath -m "$1/../..") mounts=$PWD:$PWD,$runs:$runs${RELAY_MOUNTS:+,$RELAY_MOUNTS}
# Where an image sets a variable of the same name, the job's is lost unless it is named here.
names=$(compgen -e | grep -E '^(PET|RELAY|NCCL|GLOO|FI|OMP|HF|TORCH|VLLM)_' | paste -sd,)
case $RELAY_RUNTIME in
  none) python=.venv/bin/python ;;
  pyxis) # writable, or the first tool that caches in $HOME dies
    launch+=("--container-image=$RELAY_IMAGE" --container-writable "--container-mounts=$mounts"
      "--container-workdir=$PWD" "--container-env=$names") ;;
  apptainer)
    command -v apptainer > /dev/null || [ -n "${DRY_RUN:-}" ] ||
      refuse "$SLURMD_NODENAME: no apptainer on PATH; site.env may set PATH"
    for name in ${names//,/ }; do export "APPTAINERENV_$name=${!name}"; done
    launch+=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$RELAY_IMAGE") ;;
  oci) # the bundle's config.json names folder and mounts; a task is told no SLURM_NODEID
    [ "${nodes:-1}" = 1 ] || refuse "slurm/site.env: RELAY_RUNTIME=oci runs on one node: NODES=1"
    launch+=("--container=$RELAY_IMAGE") ;;
  *) refuse "slurm/site.env: RELAY_RUNTIME=$RELAY_RUNTIME; known: none, pyxis, apptainer, oci" ;;
esac
launch+=("$python" -m "scripts.${stage//-/_}" "$directory")
if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${launch[@]}"; exit; fi
rm -f "$directory/retry"; "${launch[@]}" && exit 0 || code=$?
[ "$code" != 64 ] || exit 64
# The script has left its word in time, `again` or `down`, and why: scripts/run/retry.py.
read -r word why 2> /dev/null < "$directory/retry" || word=down why="no attempt began"
down="$stage: exit $code, $why: not requeued; mended, the same command goes on"
[ "$word" = again ] || { echo "$down" >&2; exit "$code"; }
# make stop has set Requeue=0. scontrol would requeue a cancelled job, too: so look at its state.
case $(scontrol -o show job "$job") in *JobState=RUNNING*Requeue=1*) scontrol requeue "$job" ;; esac
exit "$code"
