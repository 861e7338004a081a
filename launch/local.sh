#!/usr/bin/env bash
# Train with several processes on this machine: each has its share of the devices.
#
#   launch/local.sh [options] --config FILE --run-dir DIR [arguments of spo_jax.train ...]
#
#   --processes N    how many (2)
#   --devices N      of all processes together (as many as processes): virtual ones on the CPU,
#                    GPUs with JAX_PLATFORMS=cuda
#   --port PORT      of process 0 (one that is free)
#   --grace SECONDS  for the others to end once one has died, before they are killed (30)
#   --command CMD    start this shell command instead of python -m spo_jax.train
#   --dry-run        print the commands, start nothing
#
# Its exit code is that of the first process that fails. Ctrl-C and SIGTERM are passed on.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

processes=2 devices='' port='' grace=30 command=''
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) DRY_RUN=true; shift ;;
    --processes) processes=$(value_of --processes "$@"); shift 2 ;;
    --devices) devices=$(value_of --devices "$@"); shift 2 ;;
    --port) port=$(value_of --port "$@"); shift 2 ;;
    --grace) grace=$(value_of --grace "$@"); shift 2 ;;
    --command) command=$(value_of --command "$@"); shift 2 ;;
    *) break ;;
  esac
done
is_count --processes "$processes"
devices=${devices:-$processes}
is_count --devices "$devices"
is_count --grace "$grace"
[[ -z $port ]] || is_count --port "$port"
((devices % processes == 0)) || die "--devices $devices is no multiple of --processes $processes"

python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=$(command -v "$python" || command -v python3) || die "no python3 found"
if [[ -n $command ]]; then
  program=(bash -c "$command" spo_jax.train "$@")
else
  has_option --config "$@" || die "--config FILE is missing"
  has_option --run-dir "$@" || die "--run-dir DIR is missing: the processes must agree on it"
  program=("$python" -m spo_jax.train "$@")
fi

if [[ -z $port ]] && $DRY_RUN; then
  port=12355
elif [[ -z $port ]]; then
  port=$("$python" -c 'import socket
with socket.socket() as s:
  s.bind(("localhost", 0))
  print(s.getsockname()[1])')
fi

platform=${JAX_PLATFORMS:-cpu}
share=$((devices / processes))
# environment INDEX: sets `words`, the environment and command of a process.
environment() {
  words=(
    env "SPO_COORDINATOR=localhost:$port" "SPO_PROCESSES=$processes" "SPO_PROCESS_ID=$1"
    "JAX_PLATFORMS=$platform"
  )
  if [[ $platform == cpu ]]; then
    local flag="--xla_force_host_platform_device_count=$share"
    words+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flag")
  else
    local ids
    ids=$(seq -s, $(($1 * share)) $(($1 * share + share - 1)))
    words+=("CUDA_VISIBLE_DEVICES=$ids")
  fi
  words+=("${program[@]}")
}

if $DRY_RUN; then
  for ((i = 0; i < processes; i++)); do
    environment "$i"
    echo "$(quoted "${words[@]}") &"
  done
  echo wait
  exit 0
fi

declare -A alive=()
groups=() printers=()
asked=false
pass_on() {
  asked=true
  local pid
  # To the process alone: its grading workers must outlive its last iteration.
  for pid in "${alive[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

for ((i = 0; i < processes; i++)); do
  environment "$i"
  exec {out}> >(trap '' INT TERM; exec sed -u "s/^/[$i] /")
  printers+=($!)
  # Job control gives a process a group of its own; without it bash has it ignore Ctrl-C.
  set -m
  "${words[@]}" >&"$out" 2>&1 {out}>&- </dev/null &
  alive[$i]=$!
  set +m
  groups+=("${alive[$i]}")
  exec {out}>&-
done

code=0 deadline=''
while ((${#alive[@]})); do
  for i in "${!alive[@]}"; do
    pid=${alive[$i]}
    kill -0 "$pid" 2>/dev/null && continue
    status=0
    wait "$pid" || status=$?
    unset "alive[$i]"
    ((status && !code)) || continue
    code=$status
    deadline=$((SECONDS + grace))
    echo "$0: process $i ended with exit code $code; stopping the others" >&2
    # Asked to stop (130, 143), the others are saving: a second SIGTERM would cut that short.
    $asked || ((code == 130 || code == 143)) || pass_on TERM
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
    for pid in "${alive[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  fi
  sleep 0.1 || true
done

# Whatever they left behind, so that nothing holds a port or a pipe.
for pid in "${groups[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
wait "${printers[@]}" 2>/dev/null || true
exit "$code"
