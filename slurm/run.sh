#!/usr/bin/env bash
# The mechanism: every slurm/<stage>.sbatch ends in it, on the job's first node, in the repository.
#   slurm/run.sh runs/<run>/<stage>       DRY_RUN=1 shows what it would start on each node
set -euo pipefail
directory=$1 stage=$(basename "$1") shared="is it on a filesystem that all nodes share? Else choose another with RUNS="
# shellcheck source=slurm/site.env
set -a; . slurm/site.env >&2; set +a # it may print: a module's banner is no part of a line to paste
refuse() { echo "error: $*" >&2; exit 64; } # 64 is never retried
fact() { sed -n "s/^$1=//p" "$directory/stage.env"; }

if [ -z "${DRY_RUN:-}" ]; then
  [ -r "$directory/stage.env" ] || refuse "$SLURMD_NODENAME: $(realpath -m "$directory")/stage.env cannot be read; $shared"
  nodes=$(fact NODES) gpus=$(fact GPUS)
  [ "$SLURM_JOB_NUM_NODES" = "${nodes:-1}" ] ||
    refuse "Slurm gave $SLURM_JOB_NUM_NODES nodes, the run wants ${nodes:-1}: $directory/submitted.txt is the line to submit it with"
  # NodeAddr is how Slurm itself reaches the node, also where the node's name does not resolve.
  read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  RELAY_ADDRESS=$(scontrol --oneliner show node "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  getent ahosts "$RELAY_ADDRESS" > /dev/null ||
    refuse "$head: its address $RELAY_ADDRESS does not resolve on $SLURMD_NODENAME; mend DNS, /etc/hosts, or NodeAddr in slurm.conf"
fi
# torchrun's own names. Backend, endpoint and id together: an endpoint alone means the backend "static". A new id for
# each start of a job: the old rendezvous is closed. A port of the job's own: two jobs may share a head node.
job=${SLURM_JOB_ID:-0}
export RELAY_ADDRESS=${RELAY_ADDRESS:-head} RELAY_JOB=${SLURM_CLUSTER_NAME:-cluster}:$job
export PET_NNODES=${nodes:-1} PET_NPROC_PER_NODE=${gpus:-1} PET_RDZV_BACKEND=c10d
export PET_RDZV_ENDPOINT=$RELAY_ADDRESS:$((20000 + job % 10000)) PET_RDZV_ID=$job-${SLURM_RESTART_COUNT:-0}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun reads sbatch's no more, and gives one

read -ra flags <<< "$RELAY_SRUN_FLAGS"
# --wait: a node whose script died ends the others a minute later, when they have said why.
launch=(srun --wait=60 --kill-on-bad-exit=0 "${flags[@]}") python=python3
runs=$(realpath -m "$directory/../..")
mounts=$PWD:$PWD,$runs:$runs${RELAY_MOUNTS:+,$RELAY_MOUNTS}
# A variable that the image sets, too, wins over the job's unless it is named.
names=$(compgen -e | grep -E '^(PET|RELAY|NCCL|GLOO|FI|OMP|HF|TORCH|VLLM)_' | paste -sd,)
case $RELAY_RUNTIME in
  none) python=.venv/bin/python ;;
  pyxis) # writable, or the first tool that caches in $HOME dies
    launch+=("--container-image=$RELAY_IMAGE" --container-writable "--container-mounts=$mounts" "--container-workdir=$PWD")
    launch+=("--container-env=$names") ;;
  apptainer)
    [ -n "${DRY_RUN:-}" ] || command -v apptainer > /dev/null || refuse "$SLURMD_NODENAME: no apptainer on PATH; site.env may set PATH"
    for name in ${names//,/ }; do export "APPTAINERENV_$name=${!name}"; done
    launch+=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$RELAY_IMAGE") ;;
  *) refuse "slurm/site.env: RELAY_RUNTIME=$RELAY_RUNTIME: unknown; known: none, pyxis, apptainer" ;;
esac
launch+=("$python" -m "scripts.$stage" "$directory")
if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${launch[@]}"; exit; fi

# shellcheck disable=SC2016  # expanded on each node
[ "$PET_NNODES" = 1 ] || srun sh -c '[ -r "$0" ] || { echo "error: $SLURMD_NODENAME: $0 cannot be read; $1" >&2; exit 64; }' \
  "$(realpath "$directory")/stage.env" "$shared" || exit 64
code=0
"${launch[@]}" || code=$?
case $code in 0 | 64) exit "$code" ;; esac

# 75 is saved: again. A fault: again, unless it is the third in a row of this job. No attempt at all: the site's fault.
faults=0 newest=$(find "$directory/attempts" -name '[0-9]*.json' 2> /dev/null | wc -l)
attempt() { grep -qs "$2" "$directory/attempts/$1.json"; }
for ((n = newest; n > 0; n--)); do
  if attempt "$n" '"exit": 75' || ! attempt "$n" "\"job\": \"$RELAY_JOB\""; then break; fi
  faults=$((faults + 1))
done
attempt "$newest" "\"job\": \"$RELAY_JOB\"" || faults=3
if [ "$faults" -ge 3 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge 200 ]; then
  echo "$stage: exit $code, $faults faults in a row, ${SLURM_RESTART_COUNT:-0} restarts: not requeued; mended, the same command goes on" >&2
  exit "$code"
fi
# make stop has set Requeue=0. A cancelled job could be requeued all the same, so its state is looked at, too.
case $(scontrol --oneliner show job "$job") in *JobState=RUNNING*Requeue=1*) scontrol requeue "$job" ;; esac
exit "$code"
