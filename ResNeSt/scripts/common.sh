#!/usr/bin/env bash
# What the script beside it is built of; it sources this file. It changes to no folder: every relative path, and the
# logs, belong to the folder of the caller. DDRNet/scripts has the same functions, and a test keeps them the same.
#
# PYTHON         the Python that has MindSpore (default: python)
# DEVICE_TARGET  device instead of Ascend: CPU
set -euo pipefail

PYTHON=${PYTHON:-python}
MODEL=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# The signals that came while the last command ran.
signals=()

# usage ARGUMENTS: how to call the script, exit status 1.
usage() {
  echo "Usage: bash $0 $1" >&2
  exit 1
}

# fail MESSAGE: something the user can put right, exit status 2.
fail() {
  echo "error: $1" >&2
  exit 2
}

need_python() {
  command -v -- "$PYTHON" >/dev/null ||
    fail "there is no program $PYTHON; activate the environment that has MindSpore, or set PYTHON to its python"
}

is_number() {
  [[ $1 =~ ^[0-9]+$ ]]
}

# are_values N ARGUMENT...: whether there are at least N arguments and the first N are no flags.
are_values() {
  local count=$1 value
  shift
  (($# >= count)) || return 1
  for value in "${@:1:count}"; do
    [[ -n $value && $value != -?* ]] || return 1
  done
}

absolute() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

# begin_log LOG: make it, empty.
begin_log() {
  : 2>/dev/null >"$1" || fail "cannot write $1; start the script in another folder"
}

# run_logged LOG COMMAND...: run the command, show both its outputs and keep them in LOG, return its exit status.
#
# A signal to the script is passed on and its effect waited for. The command gets a process group of its own (set -m),
# so that Ctrl-C in a terminal reaches it once, from here, and is not ignored as in other background commands.
run_logged() {
  local log=$1 out err out_tee err_tee command='' status=0 before
  shift
  begin_log "$log"
  # Both append: they write into one file. They end with the outputs, not with a signal.
  exec {out}> >(trap '' INT TERM HUP && exec tee -a -- "$log")
  out_tee=$!
  exec {err}> >(trap '' INT TERM HUP && exec tee -a -- "$log" >&2)
  err_tee=$!

  signals=()
  trap 'pass_on INT' INT
  trap 'pass_on TERM' TERM
  trap 'pass_on HUP' HUP
  set -m
  "$@" </dev/null 1>&"$out" 2>&"$err" &
  command=$!
  set +m
  exec {out}>&- {err}>&-
  # One that came before `command` was known.
  ((${#signals[@]} == 0)) || kill -s "${signals[-1]}" "$command" 2>/dev/null || true
  while true; do
    before=${#signals[@]}
    wait "$command" 2>/dev/null && status=0 || status=$?
    ((${#signals[@]} > before)) || break # else a signal has ended `wait`, not the command
  done
  wait "$out_tee" "$err_tee" 2>/dev/null || true # older Bash cannot wait for them; the log is then whole a moment later
  trap - INT TERM HUP
  return "$status"
}

# pass_on SIGNAL; HUP becomes TERM, after which a training saves its state.
pass_on() {
  signals+=("${1/HUP/TERM}")
  [[ -z $command ]] || kill -s "${signals[-1]}" "$command" 2>/dev/null || true
}
