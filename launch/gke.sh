#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster with JobSet; Kubernetes restarts it after a preemption.
#
#   launch/gke.sh COMMAND --name NAME [options] [--config FILE [arguments of spo_jax.train ...]]
#
#   apply    start the run NAME, from launch/gke_jobset.yaml
#   logs     of all its pods, as they come
#   delete   the job; its files stay. Also before apply, where a job of that name has ended
#
# For apply:
#   --image IMAGE            with spo_jax[tpu,math] installed and configs/ in its working directory
#   --accelerator KIND       e.g. tpu-v5-lite-podslice
#   --topology TOPOLOGY      e.g. 4x4
#   --hosts N, --chips N     hosts of the slice, and chips of each: 4 and 4 for that one
#   --claim CLAIM            a PersistentVolumeClaim, ReadWriteMany: the run lies in its NAME/
#
#   --dry-run                print the commands, run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

apply() {
  local key text args='' word topology product
  local keys=(name image accelerator topology hosts chips claim)
  need "${keys[@]}"
  topology=${option[topology]}
  need_count hosts chips
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    die "--topology '$topology' must be like 4x4 or 4x4x4"
  product=$((${topology//x/*}))
  ((product == option[hosts] * option[chips])) ||
    die "--topology $topology has $product chips; --hosts ${option[hosts]} times --chips" \
      "${option[chips]} must be as many"
  [[ -n $(value_of config "$@") ]] || die "--config FILE is missing"
  [[ -z $(value_of run-dir "$@") ]] || die "--run-dir is the claim's folder --name; leave it out"
  for word; do
    [[ $word != *[[:cntrl:]]* ]] || die "an argument holds a control character"
    word=${word//[\\]/\\\\}
    word=${word//\$/\$\$}  # Kubernetes replaces $(NAME), and reads $$ as $
    args+="${args:+, }\"${word//\"/\\\"}\""
  done
  text=$(<launch/gke_jobset.yaml)
  for key in "${keys[@]}"; do
    # They stand between double quotes in the template.
    [[ ${option[$key]} =~ ^[A-Za-z0-9._:/@-]+$ ]] || die "--$key '${option[$key]}' is no plain word"
    text=${text//"__${key^^}__"/"${option[$key]}"}
  done
  text=${text/__ARGS__/"[$args]"}  # quoted: bash 5.2 would read an & in it as the match
  if $DRY_RUN; then
    printf "kubectl apply -f - <<'EOF_JOBSET'\n%s\nEOF_JOBSET\n" "$text"
  else
    kubectl apply -f - <<<"$text"
  fi
}

task=${1-}
case $task in
  -h | --help) usage; exit ;;
  apply | logs | delete) shift ;;
  *) die "'$task' is none of apply, logs, delete" ;;
esac
read_options "name image accelerator topology hosts chips claim" "" "$@"
need name
name=${option[name]}
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name '$name' must be of a-z, 0-9 and -"
$DRY_RUN || need_program kubectl
case $task in
  apply) apply "${rest[@]}" ;;
  logs)
    run kubectl logs -f --prefix --max-log-requests=1000 -l "jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete) run kubectl delete jobset "$name" ;;
esac
