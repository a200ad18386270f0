#!/usr/bin/env bash
# One machine, no scheduler: start training again whenever it ends with exit code 75 ("the machine was asked to stop, start me again")
# or dies (killed, terminated, or a page of a file that could not be read or was not its own), and stop at success, at Ctrl-C or at a mistake that would only happen again.
#
#   examples/launch/restart.sh microdit-tiny --price-per-hour 0.4
set -uo pipefail
while true; do
  .venv/bin/microdit train "$@" --resume
  code=$?
  case $code in
    75 | 135 | 137 | 139 | 143) echo "Ended with $code: starting again." >&2 ;;
    *) exit "$code" ;;
  esac
done
