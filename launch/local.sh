#!/usr/bin/env bash
# Train with several processes on this machine: each has its share of the devices.
#
#   launch/local.sh [options] --config FILE --run-dir DIR [arguments of spo_jax.train ...]
#
#   --processes N    how many (2)
#   --devices N      of all processes together (as many as processes): virtual ones on the CPU,
#                    GPUs with JAX_PLATFORMS=cuda
#   --dry-run        print the commands, start nothing
#
# Its exit code is that of the first process that fails. Ctrl-C and SIGTERM are passed on, and a
# terminal that closes counts as SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

option=([processes]=2)
read_options "processes devices" "" "$@"
need_count processes
processes=${option[processes]}
option[devices]=${option[devices]-$processes}
need_count devices
((option[devices] % processes == 0)) ||
  die "--devices ${option[devices]} is no multiple of --processes $processes"
need_config "${rest[@]}"
[[ -n $(value_of run-dir "${rest[@]}") ]] ||
  die "--run-dir DIR is missing: the processes must agree on it"
platform=${JAX_PLATFORMS:-cpu}
case $platform in
  cpu | cuda | cuda,cpu | gpu | gpu,cpu) ;;
  *) die "JAX_PLATFORMS '$platform' must be cpu or cuda here; tpu_vm.sh and gke.sh are for TPUs" ;;
esac

# Below the ports that the system hands out by itself.
port=$((20000 + RANDOM % 12000))
while (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done

share=$((option[devices] / processes))
# Those that the caller was given, or the first ones of the machine.
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((option[devices] - 1)))}"
[[ $platform == cpu ]] || ((${#gpus[@]} >= option[devices])) ||
  die "--devices ${option[devices]}: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names" \
    "${#gpus[@]}"

# command_of INDEX: sets `words`, the environment and command of a process.
command_of() {
  words=(
    env "SPO_COORDINATOR=localhost:$port" "SPO_PROCESSES=$processes" "SPO_PROCESS_ID=$1"
    "JAX_PLATFORMS=$platform"
  )
  if [[ $platform == cpu ]]; then
    local flag="--xla_force_host_platform_device_count=$share"
    words+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flag")
  else
    words+=("CUDA_VISIBLE_DEVICES=$(IFS=,; printf '%s' "${gpus[*]:$1 * share:share}")")
  fi
  words+=("${PYTHON:-.venv/bin/python}" -m spo_jax.train "${rest[@]}")
}

if $DRY_RUN; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    echo "$(quoted "${words[@]}") &"
  done
  echo wait
  exit
fi
need_python

declare -A alive=()
groups=() printers=()

# To the processes alone: their grading workers must outlive the last iteration.
pass_on() {
  local pid
  for pid in "${alive[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
was_asked=false
trap 'was_asked=true; pass_on INT' INT
trap 'was_asked=true; pass_on TERM' TERM
# A terminal may tell it twice, and a second SIGTERM would end them before they have saved.
trap 'trap "" HUP; was_asked=true; pass_on TERM' HUP

# They must not go on when this script is killed.
tied=()
if setpriv --pdeathsig KILL true 2>/dev/null; then
  tied=(setpriv --pdeathsig KILL)
fi

for ((i = 0; i < processes; i++)); do
  command_of "$i"
  exec {out}> >(trap '' INT TERM HUP; exec sed -u "s/^/[$i] /")
  printers+=($!)
  # Job control gives a process a group of its own; without it bash has it ignore Ctrl-C.
  set -m
  "${tied[@]}" "${words[@]}" >&"$out" 2>&1 {out}>&- </dev/null &
  set +m
  alive[$i]=$!
  groups+=($!)
  exec {out}>&-
done

code=0 deadline=''
while ((${#alive[@]})); do
  for i in "${!alive[@]}"; do
    kill -0 "${alive[$i]}" 2>/dev/null && continue
    status=0
    wait "${alive[$i]}" || status=$?
    unset "alive[$i]"
    ((status && !code)) || continue
    code=$status
    # 130 and 143: it was asked to stop, and the others save with it, unless they still start.
    seconds=10
    if ((code == 130 || code == 143)); then
      $was_asked && continue
      seconds=60
    fi
    echo "$0: process $i ended with exit code $code; the others have $seconds seconds" >&2
    deadline=$((SECONDS + seconds))
  done
  [[ -z $deadline ]] || ((SECONDS < deadline)) || pass_on KILL
  sleep 0.1 || true
done

# Whatever they left behind, so that nothing holds a port or a pipe.
for pid in "${groups[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
wait "${printers[@]}" 2>/dev/null || true
exit "$code"
