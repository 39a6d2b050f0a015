# shellcheck shell=bash
# What all starters share: options, checks, and commands that run or are shown.
#
# A starter declares `option` (its options with their defaults) and calls
# `parse "$@"`. What follows `--` on its command line are flags of the script.

dry_run=0
child=""
script_flags=()
declare -A option

fail() {
  echo "error: $*" >&2
  exit 2
}

say() {
  echo "$*" >&2
}

# The comment at the head of the starter.
usage() {
  sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0"
}

parse() {
  local key
  while (($#)); do
    case $1 in
      --)
        shift
        script_flags=("$@")
        return
        ;;
      --help)
        usage
        exit 0
        ;;
      --dry_run) dry_run=1 ;;
      --*)
        key=${1%%=*}
        key=${key#--}
        [[ -n ${option[$key]+known} ]] \
          || fail "unknown option --$key; --help lists them, and flags of the script come after --"
        if [[ $1 == *=* ]]; then
          option[$key]=${1#*=}
        elif [[ ${option[$key]} == false || ${option[$key]} == true ]]; then
          option[$key]=true
        else
          fail "--$key needs a value: --$key=..."
        fi
        ;;
      *) fail "unexpected $1; options are written --name=value" ;;
    esac
    shift
  done
}

# Fails unless each of these options has a value.
need() {
  local key
  for key in "$@"; do
    [[ -n ${option[$key]} ]] || fail "--$key is required"
  done
}

check_common() {
  need name script workdir
  [[ ${option[name]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] \
    || fail "--name=${option[name]} must be up to 40 lower-case letters, digits and hyphens, from a letter on"
  [[ ${option[script]} =~ ^[a-z][a-z0-9_.]*$ ]] \
    || fail "--script=${option[script]} must name a script of launch, as train_lm"
  [[ ${option[workdir]} == /* ]] \
    || fail "--workdir=${option[workdir]} must be an absolute path that all hosts share"
  if [[ -n ${option[flagfile]} && ! -f ${option[flagfile]} ]]; then
    fail "--flagfile=${option[flagfile]}: there is no such file"
  fi
}

# Whole numbers from 1.
check_number() {
  local key
  for key in "$@"; do
    [[ ${option[$key]} =~ ^[1-9][0-9]{0,5}$ ]] \
      || fail "--$key=${option[$key]} must be a whole number from 1"
  done
}

check_program() {
  ((dry_run)) || command -v "$1" >/dev/null || fail "$1 is not installed"
}

# The script's command line, for a flagfile at $1 (none where that is empty).
script_command() {
  command=(python3 -m "launch.${option[script]}")
  [[ -z $1 ]] || command+=("--flagfile=$1")
  command+=("--multihost" "--workdir=${option[workdir]}")
  # A tenth less than who ends it waits, so that it can say why.
  [[ -z ${option[grace]:-} ]] \
    || command+=("--grace=$(((option[grace] * 9 + 9) / 10))")
  command+=(${script_flags[@]+"${script_flags[@]}"})
}

show() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

# Runs a command so that a signal reaches it at once; a dry run shows it.
run() {
  local status=0
  if ((dry_run)); then
    show "$@"
    return
  fi
  "$@" &
  child=$!
  wait "$child" || status=$?
  child=""
  return "$status"
}

# As `run`, with standard input from a text.
run_with() {
  local text=$1 status=0
  shift
  if ((dry_run)); then
    show "$@"
    printf '%s\n' "$text"
    return
  fi
  "$@" <<<"$text" &
  child=$!
  wait "$child" || status=$?
  child=""
  return "$status"
}

stop() {
  say "stopped by a signal"
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  exit "$1"
}

# Calls a function when the starter ends, whatever ends it.
at_end() {
  # shellcheck disable=SC2064 # The name is known now.
  trap "trap '' INT TERM; $1" EXIT
  trap 'stop 143' TERM
  trap 'stop 130' INT
}
