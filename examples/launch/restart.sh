#!/usr/bin/env bash
# One machine, no scheduler: restart training whenever it ends with exit code 75 ("preempted, start me again") or dies of a signal (killed,
# terminated, bus error, segmentation fault). Stop on success, on Ctrl-C, and on errors that would only happen again.
#
#   examples/launch/restart.sh microdit-tiny --price-per-hour 0.4
#
# On a machine whose disk vanishes with it, name a place in an object store; the same line on another machine continues:
#
#   examples/launch/restart.sh microdit-tiny data.path=s3://BUCKET/mine --out s3://BUCKET/runs/tiny
set -uo pipefail
while true; do
  .venv/bin/microdit train "$@" --resume
  code=$?
  case $code in
    75 | 135 | 137 | 139 | 143) echo "Ended with $code: restarting." >&2 ;;
    *) exit "$code" ;;
  esac
done
