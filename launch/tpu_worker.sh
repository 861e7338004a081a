#!/usr/bin/env bash
# On one worker of a TPU VM slice, where launch/tpu_vm.sh calls it: starts the trainer, or joins
# the one that is running; shows its log and ends with its exit code.
#
#   launch/tpu_worker.sh [--dry-run] BUCKET RUN [arguments of spo_jax.train ...]
#   launch/tpu_worker.sh --stop
#
#   --dry-run   print the commands, mount and start nothing
#   --stop      SIGTERM to the trainer, which saves at the end of the iteration and ends
#
# The trainer outlives the connection that started it. Its log is ~/.spo_jax/train.log.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

state=$HOME/.spo_jax
log=$state/train.log
runs=$HOME/spo_runs

stop() {
  # A pid that was left behind may be another program's by now; a trainer's lock is held.
  if [[ ! -s $state/pid ]] || flock -n "$state/lock" true; then
    echo "$0: no trainer is running on $HOSTNAME"
  else
    kill -TERM "$(<"$state/pid")" || true
    echo "$0: the trainer on $HOSTNAME saves at the end of the iteration and ends"
  fi
}

# follow TAIL_OPTION...: shows the log from there until the trainer has ended.
follow() {
  local code=1
  flock "$state/lock" true </dev/null &>/dev/null &  # ends when the lock is free
  tail "$@" -s 0.2 --pid=$! -f "$log"
  [[ ! -s $state/code ]] || code=$(<"$state/code")
  exit "$code"
}

# Called with the lock, which is file 9: the trainer's keeper takes it over, and nobody else.
start() {
  local shown mounted
  rm -f "$state/pid" "$state/code"
  mkdir -p "$runs"
  if mountpoint -q "$runs"; then
    mounted=$(cat "$state/bucket" 2>/dev/null || echo another)
    [[ $mounted == "$bucket" ]] ||
      die "$runs is bucket '$mounted', not '$bucket': fusermount -u it, or delete the slice"
  else
    "${mount[@]}" 9>&-
    echo "$bucket" >"$state/bucket"
  fi
  [[ ! -e $run_dir/config.yaml ]] || trainer+=(--resume)
  echo "$job" >"$state/job"
  shown=$(wc -c <"$log")
  # The keeper waits for the exit code, leaves SIGTERM to the trainer, and takes it along when it
  # is killed itself: the lock says whether there is one.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    state=$1 code=0
    shift
    trap : TERM
    (echo "$BASHPID" >"$state/pid"; exec setpriv --pdeathsig KILL "$@" 9>&-) || code=$?
    echo "$code" >"$state/code"
  ' spo_jax "$state" "${trainer[@]}" </dev/null >>"$log" 2>&1 &
  exec 9>&-
  follow -c "+$((shown + 1))"
}

join() {
  local running
  running=$(<"$state/job")
  [[ $running == "$job" ]] ||
    die "a trainer is running for another call ($running); launch/tpu_vm.sh stop ends it"
  echo "$0: joins the trainer that is running on $HOSTNAME" >&2
  exec 9>&-
  follow -n 20
}

case ${1-} in
  -h | --help) usage; exit ;;
  --stop) stop; exit ;;
  --dry-run) DRY_RUN=true; shift ;;
esac
[[ $# -ge 2 && $1 != -* ]] || die "BUCKET and RUN are missing; launch/tpu_vm.sh calls this"

job=$(quoted "$@") bucket=$1
run_dir=$runs/$2
# orbax renames folders, which gcsfuse refuses by default in a bucket without hierarchical
# namespace.
mount=(gcsfuse --implicit-dirs --rename-dir-limit=200000 "$bucket" "$runs")
# Compiled programs lie in the bucket too, for the next slice.
trainer=(
  env SPO_DISTRIBUTED=auto "JAX_PLATFORMS=tpu,cpu" "JAX_COMPILATION_CACHE_DIR=$runs/.jax_cache"
  .venv/bin/python -m spo_jax.train "${@:3}" --run-dir "$run_dir"
)
if $DRY_RUN; then
  quoted "${mount[@]}"
  quoted "${trainer[@]}"
  exit
fi

mkdir -p "$state"
: >>"$log"
exec 9>>"$state/lock"
until flock -n 9; do
  [[ ! -s $state/pid || -e $state/code ]] || join
  sleep 0.2  # the other one is about to start, or to end
done
start
