#!/usr/bin/env bash
# Runs a script of launch on all workers of a Cloud TPU slice.
#
#   launch/starters/tpu_vm.sh --name=run1 --project=P --zone=us-east5-a \
#       --type=v5p-128 --script=train_lm --flagfile=flags.txt \
#       --workdir=/mnt/shared/run1 --collect=runs/run1 -- --num_steps=1000
#
# It creates the slice, or takes one of that name that is ready, installs this
# tree on every worker, runs the command on all of them at once, copies the
# workdir back, and deletes what it created, whatever happened before. Options:
#
#   --name      of the slice
#   --project   of Google Cloud
#   --zone      where the slice is
#   --type      accelerator type, as v5p-128 (128 TensorCores, 64 chips)
#   --version   software of the TPU VM
#   --queued    asks for a queued resource and waits until it is active
#   --wait      minutes that a queued resource is waited for
#   --spot      may be taken away at any time; the same command continues
#   --keep      leaves the slice running at the end; it goes on costing money
#   --script    of launch
#   --flagfile  of the script; --flagfile=WORKDIR/flags.txt repeats a run
#   --workdir   a path that all workers share, such as a Filestore mount
#   --collect   local folder for the workdir's files; empty copies nothing
#   --dry_run   prints every command and runs none
#
# It exits with the status of the script, 2 where it refuses its options, 1
# where a command of gcloud failed.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/starters/common.sh
source "$here/common.sh"

option=(
  [name]="" [project]="" [zone]="" [type]="" [version]=tpu-ubuntu2204-base
  [queued]=false [wait]=720 [spot]=false [keep]=false
  [script]="" [flagfile]="" [workdir]="" [collect]=""
)
parse "$@"
check_common
need project zone type version
check_number wait
check_program gcloud

place=("--project=${option[project]}" "--zone=${option[zone]}")
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
created=0
packed=""

state_of_vm() {
  "${vm[@]}" describe "${option[name]}" "${place[@]}" "--format=value(state)" \
    2>/dev/null || true
}

# shellcheck disable=SC2317 # It is called at the end.
# shellcheck disable=SC2329  # By its name, where the script ends.
delete_all() {
  [[ -z $packed ]] || rm -f "$packed"
  ((created)) || return 0
  if [[ ${option[keep]} == true ]]; then
    say "kept: ${option[name]} goes on running, and costing"
    return 0
  fi
  local what=("${vm[@]}" delete "${option[name]}" "${place[@]}" --quiet)
  if [[ ${option[queued]} == true ]]; then
    what=("${queue[@]}" delete "${option[name]}" "${place[@]}" --force --quiet)
  fi
  if ((dry_run)); then
    show "${what[@]}"
  elif ! "${what[@]}" && [[ -n $(state_of_vm) ]]; then
    say "error: ${option[name]} could not be deleted and goes on costing:" \
      "$(show "${what[@]}")"
  fi
}

create() {
  local spot=()
  [[ ${option[spot]} == false ]] || spot=(--spot)
  created=1
  if [[ ${option[queued]} == true ]]; then
    run "${queue[@]}" create "${option[name]}" "--node-id=${option[name]}" \
      "${place[@]}" "--accelerator-type=${option[type]}" \
      "--runtime-version=${option[version]}" ${spot[@]+"${spot[@]}"} \
      || return 1
    wait_for_queue
    return
  fi
  run "${vm[@]}" create "${option[name]}" "${place[@]}" \
    "--accelerator-type=${option[type]}" "--version=${option[version]}" \
    ${spot[@]+"${spot[@]}"}
}

wait_for_queue() {
  local ask=("${queue[@]}" describe "${option[name]}" "${place[@]}"
    "--format=value(state.state)")
  if ((dry_run)); then
    show "${ask[@]}"
    return
  fi
  local state minute
  for ((minute = 0; minute < option[wait]; minute++)); do
    state=$("${ask[@]}") || return 1
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        say "error: the queued resource is $state"
        return 1
        ;;
    esac
    say "the queued resource is $state"
    run sleep "${STARTER_POLL_SECONDS:-60}"
  done
  say "error: no slice within ${option[wait]} minutes"
  return 1
}

on_all() {
  run "${vm[@]}" ssh "${option[name]}" "${place[@]}" --worker=all "--command=$1"
}

install() {
  local root
  root=$(cd "$here/../.." && pwd)
  packed=$(mktemp --suffix=.tgz)
  run tar -C "$root" --exclude=__pycache__ -czf "$packed" \
    pyproject.toml README.md LICENSE scansnap_jax joma kernels_pallas launch \
    || return 1
  run "${vm[@]}" scp "$packed" "${option[name]}:tree.tgz" "${place[@]}" \
    --worker=all || return 1
  if [[ -n ${option[flagfile]} ]]; then
    run "${vm[@]}" scp "${option[flagfile]}" "${option[name]}:flags.txt" \
      "${place[@]}" --worker=all || return 1
  fi
  on_all "rm -rf tree && mkdir tree && tar -xzf tree.tgz -C tree && python3 -m venv env && env/bin/pip install -q './tree[tpu]'"
}

work() {
  local flags="" text
  [[ -z ${option[flagfile]} ]] || flags="../flags.txt"
  script_command "$flags"
  command[0]=../env/bin/python
  printf -v text '%q ' "${command[@]}"
  on_all "cd tree && ${text% }"
}

collect() {
  [[ -n ${option[collect]} ]] || return 0
  run mkdir -p "${option[collect]}" || return 1
  run "${vm[@]}" scp --recurse "${option[name]}:${option[workdir]}" \
    "${option[collect]}" "${place[@]}" --worker=0
}

at_end delete_all
state=""
((dry_run)) || state=$(state_of_vm)
if [[ $state == READY ]]; then
  say "reusing ${option[name]}, which is left running at the end"
elif [[ -n $state ]]; then
  fail "there is a ${option[name]} already, and it is $state"
else
  create || { say "error: the slice could not be created"; exit 1; }
fi
install || { say "error: the tree could not be installed"; exit 1; }
status=0
work || status=$?
((status == 0)) || say "error: the script ended with status $status"
# What a run that failed has saved is what it continues from.
collect || { say "error: ${option[workdir]} could not be copied"; status=1; }
exit "$status"
