#!/usr/bin/env bash
# What launch/slurm.sh submits: one process of spo_jax.train per node of the job.
#
#   sbatch ... launch/slurm_job.sh --config FILE --run-dir DIR [arguments of spo_jax.train ...]
#
#   --dry-run   first: print the srun command, run nothing
set -euo pipefail

# sbatch runs a copy of this file, so it cannot find lib.sh beside itself.
dry_run=false
case ${1-} in
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
  --dry-run) dry_run=true; shift ;;
esac
die() { echo "$0: $*" >&2; exit 2; }
[[ -n ${SLURM_JOB_ID-} ]] || die "not inside a Slurm job; launch/slurm.sh submits one"

run_dir=
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --run-dir) run_dir=${words[i + 1]-} ;;
    --run-dir=*) run_dir=${words[i]#*=} ;;
  esac
done
[[ -n $run_dir ]] || die "--run-dir DIR is missing"
[[ ! -e $run_dir/config.yaml ]] || words+=(--resume)

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Two jobs on one node must not meet; the job's number tells their ports apart.
export SPO_COORDINATOR=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
export SPO_PROCESSES=$SLURM_JOB_NUM_NODES
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
python=${PYTHON:-.venv/bin/python}
# $SLURM_PROCID is known on the node only, so a shell there reads it; exec lets SIGTERM through.
# shellcheck disable=SC2016
step=(
  srun --kill-on-bad-exit=0 bash -c 'SPO_PROCESS_ID=$SLURM_PROCID exec "$@"' spo_jax
  "$python" -m spo_jax.train "${words[@]}"
)
if $dry_run; then
  printf 'export SPO_COORDINATOR=%q SPO_PROCESSES=%q JAX_PLATFORMS=%q\n' \
    "$SPO_COORDINATOR" "$SPO_PROCESSES" "$JAX_PLATFORMS"
  printf '%q ' "${step[@]}"
  echo
  exit 0
fi

code=0
"${step[@]}" || code=$?
# Slurm requeues a preempted job, but not one whose time limit came near.
if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
