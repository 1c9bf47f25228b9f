#!/usr/bin/env bash
# Finds what sbatch passes over in the files beside this one; where a cluster answers, asks it, too:
# make lint.
set -euo pipefail
cd "$(dirname "$0")/.."
found=0
say() { echo "$*" >&2; found=1; }
for file in slurm/*.sbatch; do
  bash -n "$file" || found=1
  # sbatch stops looking at the first command, and takes "# SBATCH" for a comment: both lose
  # options without a word.
  while read -r line; do say "$file:$line"; done < <(awk '
    /^#[[:space:]]+SBATCH/       { print FNR ": \"# SBATCH\" is a comment; write #SBATCH" }
    /^#SBATCH/ && command        { print FNR ": #SBATCH after the first command is not read" }
    !/^#/ && !/^[[:space:]]*$/   { command = 1 }' "$file")
  for option in time signal requeue open-mode=append ntasks-per-node=1; do
    grep -q "^#SBATCH --$option" "$file" || say "$file: no #SBATCH --$option"
  done
  [ "$(wc -l < "$file")" -le 15 ] ||
    say "$file: more than 15 lines; what is not a header belongs into slurm/run.sh"
done
if command -v sbatch > /dev/null && timeout 5 scontrol ping 2> /dev/null | grep -q "is UP"; then
  # shellcheck source=slurm/site.env
  set -a; . slurm/site.env; set +a
  for file in slurm/*.sbatch; do
    said=$(sbatch --test-only "$file" runs/x/y 2>&1) || say "$file: $said"
  done
fi
exit "$found"
