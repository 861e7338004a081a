#!/usr/bin/env bash
# What launch/slurm.sh submits: one process of spo_jax.train per node of the job.
#
#   sbatch ... launch/slurm_job.sh --config FILE --run-dir DIR [arguments of spo_jax.train ...]
#
#   --dry-run   first: print the srun command, run nothing
set -euo pipefail
# sbatch runs a copy of this file, in the directory where it was called: the repository root.
# shellcheck source=launch/lib.sh
source launch/lib.sh

read_options "" "" "$@"
for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES; do
  [[ -n ${!name-} ]] || die "$name is not set: not inside a Slurm job; launch/slurm.sh submits one"
done
need_config "${rest[@]}"
run_dir=$(value_of run-dir "${rest[@]}")
[[ -n $run_dir ]] || die "--run-dir DIR is missing"
need_program scontrol
$DRY_RUN || need_python
[[ ! -e $run_dir/config.yaml ]] || rest+=(--resume)

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Two jobs on one node must not meet; the job's number tells their ports apart.
coordinator=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
# srun does not take this from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A node knows its number only there, so a shell reads it; exec lets SIGTERM through.
# shellcheck disable=SC2016
step=(
  srun --kill-on-bad-exit=0 env "SPO_COORDINATOR=$coordinator"
  "SPO_PROCESSES=$SLURM_JOB_NUM_NODES" "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}"
  bash -c 'SPO_PROCESS_ID=$SLURM_PROCID exec "$@"' spo_jax
  "${PYTHON:-.venv/bin/python}" -m spo_jax.train "${rest[@]}"
)

trap : TERM  # the processes save; this shell waits for them
code=0
run "${step[@]}" || code=$?
# Slurm requeues a preempted job, but not one whose time limit came near. scancel, which ends the
# processes too, must not.
if ((code == 143)) && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
