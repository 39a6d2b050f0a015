#!/usr/bin/env bash
# Runs a script of launch as an indexed Job on a slice of TPUs in GKE.
#
#   launch/starters/gke.sh --name=run1 --image=IMAGE --accelerator=tpu-v5p-slice \
#       --topology=4x4x4 --hosts=16 --chips=4 --script=train_lm \
#       --flagfile=flags.txt --workdir=/data/run1 --claim=shared -- --num_steps=9
#
# One pod a host; GKE puts the names of the others into the environment, where
# jax finds them. A pod that fails fails the job, and what was applied is
# deleted at the end, whatever happened before. Options:
#
#   --name         of the job
#   --namespace    of Kubernetes
#   --image        with this tree installed
#   --accelerator  of the node pool, as tpu-v5p-slice or tpu-v5-lite-podslice
#   --topology     of the node pool, as 4x4x4
#   --hosts        of the slice
#   --chips        of a host
#   --claim        persistent volume claim that all pods mount at /data
#   --grace        seconds that a pod has to save after SIGTERM
#   --wait         minutes until the job is given up
#   --keep         leaves the job, running or not
#   --script       of launch
#   --flagfile     of the script
#   --workdir      a path below /data
#   --dry_run      prints every command, with the manifest, and runs none

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/starters/common.sh
source "$here/common.sh"

option=(
  [name]="" [namespace]=default [image]="" [accelerator]="" [topology]=""
  [hosts]=1 [chips]=4 [claim]="" [grace]=120 [wait]=1440 [keep]=false
  [script]="" [flagfile]="" [workdir]=""
)
parse "$@"
check_common
need namespace image accelerator topology claim
check_number hosts chips grace wait
[[ ${option[topology]} =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] \
  || fail "--topology=${option[topology]} must be written as 4x4x4 or 4x8"
[[ ${option[workdir]} == /data/* ]] \
  || fail "--workdir=${option[workdir]} must lie below /data, where --claim is"
check_program kubectl

# A word as YAML: in single quotes, which are doubled within.
quoted() {
  printf "'%s'" "${1//\'/\'\'}"
}

manifest() {
  local word
  if [[ -n ${option[flagfile]} ]]; then
    echo "apiVersion: v1"
    echo "kind: ConfigMap"
    echo "metadata: {name: ${option[name]}}"
    echo "data:"
    echo "  flags.txt: |"
    sed 's/^/    /' "${option[flagfile]}"
    echo "---"
  fi
  cat <<YAML
apiVersion: v1
kind: Service
metadata: {name: ${option[name]}}
spec:
  clusterIP: None
  selector: {job-name: ${option[name]}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: ${option[name]}}
spec:
  completionMode: Indexed
  completions: ${option[hosts]}
  parallelism: ${option[hosts]}
  backoffLimit: 0
  template:
    spec:
      subdomain: ${option[name]}
      restartPolicy: Never
      terminationGracePeriodSeconds: ${option[grace]}
      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: $(quoted "${option[accelerator]}")
        cloud.google.com/gke-tpu-topology: $(quoted "${option[topology]}")
      containers:
      - name: launch
        image: $(quoted "${option[image]}")
        command:
YAML
  for word in "${command[@]}"; do
    echo "        - $(quoted "$word")"
  done
  cat <<YAML
        resources:
          requests: {google.com/tpu: ${option[chips]}}
          limits: {google.com/tpu: ${option[chips]}}
        volumeMounts:
        - {name: data, mountPath: /data}
YAML
  [[ -z ${option[flagfile]} ]] || echo "        - {name: flags, mountPath: /flags}"
  echo "      volumes:"
  echo "      - {name: data, persistentVolumeClaim: {claimName: $(quoted "${option[claim]}")}}"
  [[ -z ${option[flagfile]} ]] \
    || echo "      - {name: flags, configMap: {name: ${option[name]}}}"
}

control=(kubectl "--namespace=${option[namespace]}")
applied=0
text=""

# shellcheck disable=SC2317 # It is called at the end.
# shellcheck disable=SC2329  # By its name, where the script ends.
delete_all() {
  ((applied)) || return 0
  if [[ ${option[keep]} == true ]]; then
    say "kept: job ${option[name]}"
    return 0
  fi
  local what=("${control[@]}" delete --ignore-not-found --filename=-)
  if ((dry_run)); then
    show "${what[@]}"
  elif ! "${what[@]}" <<<"$text"; then
    say "error: job ${option[name]} could not be deleted and goes on costing"
  fi
}

follow() {
  local ask=("${control[@]}" get job "${option[name]}"
    "--output=jsonpath={.status.succeeded}/{.status.failed}")
  if ((dry_run)); then
    show "${ask[@]}"
    return
  fi
  local found minute
  for ((minute = 0; minute < option[wait]; minute++)); do
    found=$("${ask[@]}") || return 1
    [[ ${found%/*} != "${option[hosts]}" ]] || return 0
    if [[ ${found#*/} =~ ^[1-9] ]]; then
      say "error: ${found#*/} of ${option[hosts]} pods failed"
      return 1
    fi
    run sleep "${STARTER_POLL_SECONDS:-60}"
  done
  say "error: not finished within ${option[wait]} minutes"
  return 1
}

flags=""
[[ -z ${option[flagfile]} ]] || flags="/flags/flags.txt"
script_command "$flags"
text=$(manifest)
at_end delete_all
applied=1
run_with "$text" "${control[@]}" apply --filename=- \
  || { say "error: the manifest was not applied"; exit 1; }
status=0
follow || status=1
run "${control[@]}" logs --prefix --tail=-1 "--selector=job-name=${option[name]}" \
  "--max-log-requests=${option[hosts]}" \
  || { say "error: the logs could not be read"; status=1; }
exit "$status"
