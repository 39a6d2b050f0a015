#!/usr/bin/env bash
# Submits a script of launch to SLURM: one process a node, all GPUs of it.
#
#   launch/starters/slurm.sh --name=run1 --nodes=4 --gpus=8 --time=04:00:00 \
#       --script=train_lm --flagfile=flags.txt --workdir=/shared/run1 \
#       -- --num_steps=1000
#
# jax finds the other nodes by what SLURM puts into the environment. Before the
# time is up SLURM sends SIGTERM, on which the run saves; the same command
# continues. Options:
#
#   --name       of the job
#   --nodes      how many
#   --gpus       of each node; 0 asks for none
#   --time       at most, as SLURM writes it
#   --partition  where the job runs; empty is the default one
#   --account    that pays; empty is the default one
#   --grace      seconds between SIGTERM and the end of the time
#   --requeue    starts the job again after preemption or the loss of a node
#   --wait       waits for the end; Ctrl-C then cancels the job
#   --script     of launch
#   --flagfile   of the script
#   --workdir    a path that all nodes share; the job's log goes there too
#   --dry_run    prints every command and runs none

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/starters/common.sh
source "$here/common.sh"

option=(
  [name]="" [nodes]=1 [gpus]=8 [time]=01:00:00 [partition]="" [account]=""
  [grace]=120 [requeue]=false [wait]=false
  [script]="" [flagfile]="" [workdir]=""
)
parse "$@"
check_common
check_number nodes grace
[[ ${option[gpus]} == 0 ]] || check_number gpus
[[ ${option[time]} =~ ^[0-9]+([-:][0-9]+){0,3}$ ]] \
  || fail "--time=${option[time]} must be written as 04:00:00 or 2-00"
check_program sbatch

job=""
cancel() {
  [[ -z $job ]] || scancel "$job" || say "error: job $job could not be cancelled"
}

submit=(sbatch --parsable "--job-name=${option[name]}"
  "--nodes=${option[nodes]}" --ntasks-per-node=1 "--time=${option[time]}"
  "--signal=TERM@${option[grace]}" "--output=${option[workdir]}/slurm-%j.out")
[[ ${option[gpus]} == 0 ]] || submit+=("--gpus-per-node=${option[gpus]}")
[[ -z ${option[partition]} ]] || submit+=("--partition=${option[partition]}")
[[ -z ${option[account]} ]] || submit+=("--account=${option[account]}")
if [[ ${option[requeue]} == true ]]; then
  submit+=(--requeue --open-mode=append)
else
  submit+=(--no-requeue)
fi

flags=""
if [[ -n ${option[flagfile]} ]]; then
  flags=$(realpath "${option[flagfile]}")
fi
script_command "$flags"
submit+=("$here/job.sbatch" "${command[@]}")
run mkdir -p "${option[workdir]}"
if ((dry_run)); then
  show "${submit[@]}"
  exit 0
fi
job=$("${submit[@]}") || { say "error: sbatch refused the job"; exit 1; }
job=${job%%;*}
echo "$job"
if [[ ${option[wait]} == false ]]; then
  job=""
  exit 0
fi
at_end cancel
while [[ -n $(squeue --noheader "--jobs=$job" 2>/dev/null) ]]; do
  run sleep "${STARTER_POLL_SECONDS:-30}"
done
state=$(sacct --noheader --parsable2 --allocations --format=State "--jobs=$job")
ended=$job
job=""
if [[ $state != COMPLETED ]]; then
  say "error: job $ended is ${state:-unknown}; see ${option[workdir]}/slurm-$ended.out"
  exit 1
fi
