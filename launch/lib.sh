# shellcheck shell=bash
# What the scripts of this folder share: functions only, sourced by them.

DRY_RUN=false

die() {
  echo "$0: $*" >&2
  exit 2
}

# The header comment of the script is its usage text; the scripts work in the repository root.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "launch/${0##*/}"
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

# value_of OPTION "$@": dies where the option is the last word of the command line.
value_of() {
  (($# >= 3)) || die "$1 needs a value"
  printf '%s' "$3"
}

is_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 '$2' must be an integer above 0"
}

# has_option NAME "$@": whether NAME or NAME=value is among the arguments.
has_option() {
  local name=$1 word
  shift
  for word; do
    [[ $word == "$name" || $word == "$name="* ]] && return 0
  done
  return 1
}
