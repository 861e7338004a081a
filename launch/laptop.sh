#!/usr/bin/env bash
# Train on this machine's CPU: warm start, then SPO on generated arithmetic.
#
#   launch/laptop.sh [--dry-run] [chain|tree] [arguments of spo_jax.train ...]
#
# --dry-run prints the command instead of running it.
#   launch/laptop.sh tree --set seed=1 --set train.iterations=5
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

show=false
if [[ ${1-} == --dry-run ]]; then
  show=true
  shift
fi

method=chain
case ${1-} in
  chain | tree) method=$1; shift ;;
  -h | --help) usage; exit 0 ;;
  "" | --*) ;;
  *) die "'$1' is neither chain nor tree; options of spo_jax.train follow it" ;;
esac

config=configs/laptop_$method.yaml
args=
if (($#)); then
  [[ $* != *[[:cntrl:]]* ]] || die "an argument holds a control character"
  args=$(printf '%q ' "$@")
  args=${args//\$/\$\$}  # make reads $$ as $
fi

if $show; then
  echo "make train CONFIG=$config${args:+ ARGS=${args@Q}}"
else
  exec make train "CONFIG=$config" "ARGS=$args"
fi
