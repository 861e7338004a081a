# shellcheck shell=bash
# What the scripts of this folder share. They source it from the repository root.

DRY_RUN=false
declare -A option=()

die() {
  echo "$0: $*" >&2
  exit 2
}

# The header comment of a script is its usage text.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "launch/${0##*/}"
}

# read_options "NAMES" "FLAGS" WORD...: fills `option` from --NAME VALUE and --FLAG, and `rest`
# with the arguments of spo_jax.train, which begin with --config.
read_options() {
  local names=" $1 " flags=" $2 dry-run "
  shift 2
  while (($#)) && [[ $1 != --config && $1 != --config=* ]]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --*)
        if [[ $flags == *" ${1#--} "* ]]; then
          option[${1#--}]=true
          shift
        elif [[ $names == *" ${1#--} "* ]]; then
          (($# > 1)) || die "$1 needs a value"
          option[${1#--}]=$2
          shift 2
        else
          die "$1 is no option of this script; those of spo_jax.train follow --config FILE"
        fi
        ;;
      *) die "'$1' is no option; those of spo_jax.train follow --config FILE" ;;
    esac
  done
  DRY_RUN=${option[dry-run]-false}
  # shellcheck disable=SC2034  # read by the scripts
  rest=("$@")
}

# need NAME...: dies where one of the options is missing.
need() {
  local name
  for name; do [[ -n ${option[$name]-} ]] || die "--$name is missing"; done
}

# need_count NAME...: the same, where each must also be a positive integer.
need_count() {
  local name
  need "$@"
  for name; do
    [[ ${option[$name]} =~ ^[1-9][0-9]*$ ]] ||
      die "--$name '${option[$name]}' must be an integer above 0"
  done
}

# value_of NAME WORD...: the value of --NAME among the arguments of spo_jax.train, or nothing.
value_of() {
  local name=$1
  shift
  while (($#)); do
    case $1 in
      "--$name") [[ ${2-} == -* ]] || printf '%s' "${2-}"; return ;;
      "--$name="*) printf '%s' "${1#*=}"; return ;;
    esac
    shift
  done
}

# need_config WORD...: dies unless the arguments of spo_jax.train name a configuration of this
# checkout.
need_config() {
  local file
  file=$(value_of config "$@")
  [[ -n $file ]] || die "--config FILE is missing"
  [[ -f $file ]] || die "--config '$file' is no file in $PWD; configs/ has some"
}

# need_program NAME: dies where it is not installed.
need_program() {
  command -v "$1" >/dev/null || die "$1 is not on the PATH: run this where it is, or see --dry-run"
}

# need_python: the same for the Python of the trainer.
need_python() {
  local python=${PYTHON:-.venv/bin/python}
  command -v "$python" >/dev/null ||
    die "Python '$python' is not here: run 'make train' once, which sets up .venv, or set PYTHON"
}

quoted() {
  local words
  words=$(printf '%q ' "$@")
  printf '%s\n' "${words% }"
}

# Runs a command; with --dry-run prints it instead, ready to be pasted.
run() {
  if $DRY_RUN; then quoted "$@"; else "$@"; fi
}
