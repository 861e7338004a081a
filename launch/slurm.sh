#!/usr/bin/env bash
# Train on the GPUs of several nodes of a Slurm cluster; resumes after preemption and time limits.
#
#   launch/slurm.sh --nodes N --gpus N [options] --config FILE --run-dir DIR [arguments of
#                   spo_jax.train ...]
#
#   --nodes N          one process each
#   --gpus N           of each node
#   --time LIMIT       of one stretch, as sbatch has it (04:00:00)
#   --partition NAME, --account NAME
#   --dry-run          print the sbatch command, submit nothing
#
# The repository, its .venv and --run-dir must lie on a file system that all nodes share.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

nodes='' gpus='' time=04:00:00 extra=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) DRY_RUN=true; shift ;;
    --nodes) nodes=$(value_of --nodes "$@"); shift 2 ;;
    --gpus) gpus=$(value_of --gpus "$@"); shift 2 ;;
    --time) time=$(value_of --time "$@"); shift 2 ;;
    --partition | --account)
      value=$(value_of "$1" "$@")
      extra+=("$1=$value")
      shift 2
      ;;
    *) break ;;
  esac
done
[[ -n $nodes ]] || die "--nodes N is missing"
[[ -n $gpus ]] || die "--gpus N is missing"
is_count --nodes "$nodes"
is_count --gpus "$gpus"
has_option --config "$@" || die "--config FILE is missing"
has_option --run-dir "$@" || die "--run-dir DIR is missing: all nodes must see it"
! has_option --resume "$@" || die "--resume is added where --run-dir holds a run; leave it out"

run sbatch --job-name=spo_jax "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" \
  "--time=$time" --requeue --signal=TERM@120 --open-mode=append "${extra[@]}" \
  launch/slurm_job.sh "$@"
