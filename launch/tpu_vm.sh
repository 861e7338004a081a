#!/usr/bin/env bash
# Train on a TPU VM slice with gcloud.
#
#   launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options] [--config FILE ...]
#
#   create   the slice; needs --type and --version
#   setup    copy the committed repository (HEAD), install it, mount the bucket
#   train    on all workers, their logs on this terminal
#   run      all of these, and again after a preemption until the run is done
#   delete   the slice; the bucket stays
#
#   --type TYPE       e.g. v5litepod-16       --version IMAGE   e.g. v2-alpha-tpuv5-lite
#   --bucket BUCKET   its name; for setup, train and run. Checkpoints survive the slice there
#   --run NAME        folder of the run in the bucket; for train and run
#   --spot            cheaper, and taken away without asking
#   --retries N       of run (20)             --project PROJECT
#   --dry-run         print the commands, run nothing
#
# What follows the options goes to spo_jax.train, which gets --run-dir and --resume from here.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

task=${1-}
case $task in
  -h | --help) usage; exit 0 ;;
  create | setup | train | run | delete) shift ;;
  *) die "'$task' is none of create, setup, train, run, delete" ;;
esac

name='' zone='' type='' version='' bucket='' run_name='' retries=20 spot=() project=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) DRY_RUN=true; shift ;;
    --spot) spot=(--spot); shift ;;
    --name) name=$(value_of --name "$@"); shift 2 ;;
    --zone) zone=$(value_of --zone "$@"); shift 2 ;;
    --type) type=$(value_of --type "$@"); shift 2 ;;
    --version) version=$(value_of --version "$@"); shift 2 ;;
    --bucket) bucket=$(value_of --bucket "$@"); shift 2 ;;
    --run) run_name=$(value_of --run "$@"); shift 2 ;;
    --retries) retries=$(value_of --retries "$@"); shift 2 ;;
    --project)
      value=$(value_of --project "$@")
      project=(--project "$value")
      shift 2
      ;;
    *) break ;;
  esac
done
[[ -n $name ]] || die "--name NAME is missing"
[[ -n $zone ]] || die "--zone ZONE is missing"
is_count --retries "$retries"
if [[ $task == create || $task == run ]]; then
  [[ -n $type ]] || die "--type TYPE is missing, e.g. v5litepod-16"
  [[ -n $version ]] || die "--version IMAGE is missing, e.g. v2-alpha-tpuv5-lite"
fi
if [[ $task == setup || $task == train || $task == run ]]; then
  [[ -n $bucket ]] || die "--bucket BUCKET is missing: the run must outlive the slice"
  [[ $bucket != */* ]] || die "--bucket '$bucket' must be a name alone, without gs:// and folders"
fi
if [[ $task == train || $task == run ]]; then
  [[ -n $run_name ]] || die "--run NAME is missing"
  has_option --config "$@" || die "--config FILE is missing"
  ! has_option --run-dir "$@" || die "--run-dir is $bucket's folder --run; leave it out"
  ! has_option --resume "$@" || die "--resume is added where --run holds a run; leave it out"
fi
tpu=(gcloud compute tpus tpu-vm)
where=("$name" --zone "$zone" "${project[@]}")

create() {
  run "${tpu[@]}" create "${where[@]}" --accelerator-type "$type" --version "$version" "${spot[@]}"
}

on_all_workers() {
  run "${tpu[@]}" ssh "${where[@]}" --worker=all --command "$1"
}

mount_bucket() {
  # shellcheck disable=SC2016  # $HOME is the worker's
  printf 'mkdir -p $HOME/spo_runs; mountpoint -q $HOME/spo_runs || gcsfuse --implicit-dirs %q %s' \
    "$bucket" '$HOME/spo_runs'
}

setup() {
  local archive=build/spo_jax.tar.gz
  # Chained: errexit does not hold where the caller asks for the exit code.
  run mkdir -p build &&
    run git archive --format=tar.gz -o "$archive" HEAD &&
    run "${tpu[@]}" scp "$archive" "$name:spo_jax.tar.gz" --zone "$zone" "${project[@]}" \
      --worker=all &&
    install_everywhere
}

install_everywhere() {
  # The images bring Python 3.10, which is too old; uv brings its own.
  # shellcheck disable=SC2016
  on_all_workers 'set -e; mkdir -p spo_jax; tar -xzf spo_jax.tar.gz -C spo_jax; cd spo_jax
python3 -m pip install -q --user uv
[ -d .venv ] || $HOME/.local/bin/uv venv -q --python 3.12 .venv
$HOME/.local/bin/uv pip install -q --python .venv/bin/python -e ".[tpu]"
'"$(mount_bucket)"
}

train() {
  local folder words
  folder=$(printf '%q' "$run_name")
  words=$(quoted "$@")
  # shellcheck disable=SC2016
  on_all_workers "$(mount_bucket)"' || exit 1; cd spo_jax; dir=$HOME/spo_runs/'"$folder"'
resume=; [ ! -e "$dir/config.yaml" ] || resume=--resume
SPO_DISTRIBUTED=auto JAX_PLATFORMS=tpu,cpu exec .venv/bin/python -m spo_jax.train '"$words"' \
  --run-dir "$dir" $resume'
}

delete() {
  run "${tpu[@]}" delete "${where[@]}" --quiet
}

create_and_setup() {
  create && setup
}

state() {
  "${tpu[@]}" describe "${where[@]}" --format='value(state)' 2>/dev/null || echo MISSING
}

until_done() {
  if $DRY_RUN; then
    create; setup; train "$@"
    echo "# exit code 0: done. Else the state of the slice decides:"
    run "${tpu[@]}" describe "${where[@]}" --format='value(state)'
    echo "# READY and 143: train again. PREEMPTED, TERMINATED or gone: delete, then all again"
    delete
    return
  fi
  local attempt code now
  for ((attempt = 0; attempt <= retries; attempt++)); do
    now=$(state)
    code=0
    case $now in
      READY) ;;
      MISSING) create_and_setup || code=$? ;;
      *)
        delete || true
        create_and_setup || code=$?
        ;;
    esac
    if ((!code)); then
      train "$@" || code=$?
      ((code)) || return 0
    fi
    now=$(state)
    # A slice that is still there and no signal: the run itself failed, and would again.
    if [[ $now == READY ]] && ((code != 143 && code != 255)); then
      echo "$0: the run failed with exit code $code; the slice stays" >&2
      return "$code"
    fi
    echo "$0: stopped (exit code $code, slice $now); resuming in a minute" >&2
    sleep 60
  done
  echo "$0: gave up after $retries retries" >&2
  return 1
}

case $task in
  create) create ;;
  setup) setup ;;
  train) train "$@" ;;
  run) until_done "$@" ;;
  delete) delete ;;
esac
