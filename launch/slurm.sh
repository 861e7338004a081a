#!/usr/bin/env bash
# Train on the GPUs of several nodes of a Slurm cluster; resumes after preemption and time limits.
#
#   launch/slurm.sh --nodes N --gpus N [options] --config FILE --run-dir DIR [arguments of
#                   spo_jax.train ...]
#
#   --nodes N          one process each
#   --gpus N           of each node
#   --cpus N, --mem M  of each node, as sbatch has them; many clusters give one core if not asked
#   --time LIMIT       of one stretch, as sbatch has it (04:00:00)
#   --partition NAME, --account NAME
#   --dry-run          print the sbatch command, submit nothing
#
# The repository, its .venv and --run-dir must lie on a file system that all nodes share.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

option=([time]=04:00:00)
read_options "nodes gpus cpus mem time partition account" "" "$@"
need_count nodes gpus ${option[cpus]+cpus}
need_config "${rest[@]}"
[[ -n $(value_of run-dir "${rest[@]}") ]] || die "--run-dir DIR is missing: all nodes must see it"
if ! $DRY_RUN; then
  need_python
  need_program sbatch
fi

run sbatch --job-name=spo_jax "--nodes=${option[nodes]}" --ntasks-per-node=1 \
  "--gpus-per-node=${option[gpus]}" "--time=${option[time]}" \
  ${option[cpus]:+"--cpus-per-task=${option[cpus]}"} ${option[mem]:+"--mem=${option[mem]}"} \
  ${option[partition]:+"--partition=${option[partition]}"} \
  ${option[account]:+"--account=${option[account]}"} \
  --requeue --signal=TERM@120 --open-mode=append launch/slurm_job.sh "${rest[@]}"
