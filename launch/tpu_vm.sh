#!/usr/bin/env bash
# Train on a TPU VM slice with gcloud, in the project that it is configured for.
#
#   launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options] [--config FILE [arguments of
#                    spo_jax.train ...]]
#
#   create   the slice; needs --type and --version
#   setup    copy the committed repository (HEAD), install it
#   train    on all workers, their logs on this terminal; needs --bucket, --run and --config
#   run      all of these, and again after each preemption until the run is done
#   stop     the trainer, which saves at the end of the iteration; end `run` with Ctrl-C first
#   delete   the slice; the bucket stays
#
#   --type TYPE       e.g. v5litepod-16       --version IMAGE   e.g. v2-alpha-tpuv5-lite
#   --bucket BUCKET   its name; the checkpoints that outlive the slice lie there
#   --run NAME        folder of the run in the bucket
#   --spot            cheaper, and taken away without asking
#   --dry-run         print the commands, run nothing
#
# The arguments of spo_jax.train get --run-dir and --resume from launch/tpu_worker.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

tpu=(gcloud compute tpus tpu-vm)
commit=HEAD
MAX_FAILURES=5  # to create the first slice; for another one it waits until there is room

# Steps are chained with &&: errexit does not hold where `run` asks for the exit code.
create() {
  run "${tpu[@]}" create "${where[@]}" --accelerator-type "${option[type]}" \
    --version "${option[version]}" ${option[spot]:+--spot}
}

on_all_workers() {
  run "${tpu[@]}" ssh "${where[@]}" --worker=all --command "$1"
}

# need_committed [FILE]: dies where the workers, which get the commit, would run something else.
need_committed() {
  local changed file
  for file; do
    git ls-files --error-unmatch -- "$file" &>/dev/null ||
      die "--config '$file' is not in git, so the workers would not get it: commit it first"
  done
  changed=$(git status --porcelain -- spo_jax configs launch pyproject.toml requirements.txt "$@")
  [[ -z $changed ]] ||
    die "not committed, so the workers would not get it: ${changed//$'\n'/, }; commit it first"
  commit=$(git rev-parse HEAD)
}

setup() {
  local archive=build/spo_jax.tar.gz
  # The images bring Python 3.10, which is too old; uv brings its own.
  # shellcheck disable=SC2016  # $HOME is the worker's
  run mkdir -p build &&
    run git archive --format=tar.gz -o "$archive" "$commit" &&
    run "${tpu[@]}" scp "$archive" "${option[name]}:spo_jax.tar.gz" --zone "${option[zone]}" \
      --worker=all &&
    on_all_workers 'set -e; lock=$HOME/.spo_jax/lock
if [ -e $lock ] && ! flock -n $lock true; then
  echo "a trainer is running on $HOSTNAME: its code stays as it is"; exit
fi
mkdir -p spo_jax; tar -xzf spo_jax.tar.gz -C spo_jax; cd spo_jax
apt="sudo apt-get -o DPkg::Lock::Timeout=600 -qy"
command -v gcsfuse >/dev/null || { $apt update && $apt install gcsfuse; } ||
  { echo "gcsfuse is missing and apt-get cannot install it: see docs/launch.md" >&2; exit 1; }
python3 -m pip install -q --user uv
[ -d .venv ] || $HOME/.local/bin/uv venv -q --python 3.12 .venv
$HOME/.local/bin/uv pip install -q --python .venv/bin/python -c requirements.txt -e ".[tpu,math]"'
}

train() {
  local words
  words=$(quoted "${option[bucket]}" "${option[run]}" "$@")
  on_all_workers "cd spo_jax && exec launch/tpu_worker.sh $words"
}

stop() {
  on_all_workers '[ ! -e spo_jax/launch/tpu_worker.sh ] || exec spo_jax/launch/tpu_worker.sh --stop'
}

delete() {
  run "${tpu[@]}" delete "${where[@]}" --quiet
}

state() {
  local error
  {
    error=$("${tpu[@]}" describe "${where[@]}" --format='value(state)' 2>&1 >&3) || {
      [[ $error == *NOT_FOUND* ]] || echo "$error" >&2
      echo MISSING
    }
  } 3>&1
}

until_done() {
  local code now is_set_up=false had_slice=false failures=0
  if $DRY_RUN; then
    create; setup; train "$@"
    echo "# exit code 0: done. Else the state of the slice decides:"
    run "${tpu[@]}" describe "${where[@]}" --format='value(state)'
    echo "# READY and 143: train again. PREEMPTED, TERMINATED or gone: delete, then all again"
    delete
    return
  fi
  trap 'exit 130' INT
  while true; do
    code=0
    now=$(state)
    if [[ $now != READY ]]; then
      is_set_up=false
      if ! { { [[ $now == MISSING ]] || delete; } && create; }; then
        failures=$((failures + 1))
        $had_slice || ((failures < MAX_FAILURES)) ||
          die "creating '${option[name]}' failed $failures times in a row: mend what gcloud says" \
            "above (project, quota, --zone, --type), then run this again"
        echo "$0: no slice yet (failure $failures in a row); trying again in a minute" >&2
        sleep 60
        continue
      fi
      failures=0
    fi
    had_slice=true
    if ! $is_set_up; then
      setup && is_set_up=true || code=$?
    fi
    if ((!code)); then
      train "$@" || code=$?
      ((code)) || return 0
    fi
    now=$(state)
    # A slice that is there, and neither SIGTERM nor a broken connection: it would fail again.
    if [[ $now == READY ]] && ((code != 143 && code != 255)); then
      echo "$0: failed with exit code $code; the slice stays, delete ends it" >&2
      return "$code"
    fi
    echo "$0: stopped (exit code $code, slice $now); going on in a minute" >&2
    sleep 60
  done
}

task=${1-}
case $task in
  -h | --help) usage; exit ;;
  create | setup | train | run | stop | delete) shift ;;
  *) die "'$task' is none of create, setup, train, run, stop, delete" ;;
esac
read_options "name zone type version bucket run" spot "$@"
need name zone
where=("${option[name]}" --zone "${option[zone]}")
if [[ $task == create || $task == run ]]; then
  need type version
fi
if [[ $task == train || $task == run ]]; then
  need bucket run
  [[ ${option[bucket]} != */* ]] || die "--bucket '${option[bucket]}' must be a name, without gs://"
  need_config "${rest[@]}"
  [[ -z $(value_of run-dir "${rest[@]}") ]] || die "--run-dir is the bucket's --run; leave it out"
fi
if ! $DRY_RUN; then
  need_program gcloud
  case $task in
    setup) need_committed ;;
    run) need_committed "$(value_of config "${rest[@]}")" ;;
  esac
fi
case $task in
  train) train "${rest[@]}" ;;
  run) until_done "${rest[@]}" ;;
  *) "$task" ;;
esac
