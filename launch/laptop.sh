#!/usr/bin/env bash
# Train on this machine's CPU: warm start, then SPO on generated arithmetic.
#
#   launch/laptop.sh [--dry-run] [chain|tree] [arguments of spo_jax.train ...]
#
# --dry-run prints the command instead of running it.
#   launch/laptop.sh tree --set seed=1 --set train.iterations=5
set -euo pipefail
cd "$(dirname "$0")/.."

show=false
if [[ ${1-} == --dry-run ]]; then
  show=true
  shift
fi

method=chain
case ${1-} in
  chain | tree) method=$1; shift ;;
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
  "" | --*) ;;
  *) echo "$0: '$1' is neither chain nor tree; options of spo_jax.train follow it" >&2; exit 2 ;;
esac

config=configs/laptop_$method.yaml
args=
if (($#)); then
  args=$(printf '%q ' "$@")
fi

if $show; then
  echo "make train CONFIG=$config${args:+ ARGS=${args@Q}}"
else
  exec make train "CONFIG=$config" "ARGS=$args"
fi
