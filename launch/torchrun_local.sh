#!/usr/bin/env bash
# Starts a training script on several ranks of this machine by torchrun:
#
#     RANKS=2 launch/torchrun_local.sh examples/ddp_dgc.py --epochs 10
#     RANKS=4 launch/torchrun_local.sh -m distopt.cli doctor
#
# What to change:
#     RANKS            number of ranks; on a machine with GPUs one for each
#     OMP_NUM_THREADS  threads of each rank (default: the cores of this machine, shared out)
#     RESTARTS         how often all ranks are started again after one died (default: 0); see elastic.sh
#     DRY_RUN=1        print the command in place of running it
# Two jobs beside each other do not meet: each takes a free port of its own.
set -euo pipefail
: "${RANKS:?number of ranks}" "${1:?the script to start}"
fail() {
  printf 'torchrun_local.sh: %s\n' "$*" >&2
  exit 2
}
[[ $RANKS =~ ^[1-9][0-9]{0,4}$ ]] || fail "RANKS must be a number of ranks, got '$RANKS'"
[[ ${RESTARTS:-0} =~ ^[0-9]{1,4}$ ]] || fail "RESTARTS must be a number, got '$RESTARTS'"
share=$(($(nproc) / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}
command=(python -m torch.distributed.run --standalone --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-0}" "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' env "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
