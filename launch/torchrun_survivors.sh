#!/usr/bin/env bash
# Starts a training script under torchrun so that the others outlive a rank that is killed. On one machine:
#
#     RANKS=5 launch/torchrun_survivors.sh examples/coded_training.py
#
# or the same line on every host, with its own number, one torchrun agent on each:
#
#     NODE_RANK=0 NODES=5 MASTER=10.0.0.1 launch/torchrun_survivors.sh examples/coded_training.py
#
# What to change:
#     RANKS            number of ranks on this host (default: 1 where NODES is given)
#     NODES            number of hosts; without it all ranks are on this machine
#     NODE_RANK        this host's number, from 0
#     MASTER           an address of host 0 that all hosts reach; PORT a free port there (default: 29500)
#     INTERFACE        the network to train over (eth0, ...), on hosts with several
#     ESSENTIAL        ranks that the others cannot do without (default: 0, the master; ESSENTIAL= for none)
#     OMP_NUM_THREADS  threads of each rank (default: 1)
#
# A torchrun agent ends all its ranks when one of them fails, and at the end of the job the other agents wait for it, up
# to 300 s (torch 2.13 has an option for neither). So each rank runs below a small process of its own: this script
# again, as `torchrun_survivors.sh --rank COMMAND`. When a signal ends the rank (SIGKILL, out of memory, a segmentation
# fault), that process says so and ends well in its place; the agent never sees a failure, and all end together.
#
# A rank that ends with an error of its own ends the job, as under any torchrun. So does the death of a rank that the
# others cannot do without, those listed in ESSENTIAL.
#
# Limits: an agent that is killed itself, with its host say, is still waited for at the end.
set -euo pipefail

fail() {
  printf 'torchrun_survivors.sh: %s\n' "$*" >&2
  exit 2
}

run_rank() {
  local rank status=0 asked=no own=()
  # If this process is killed, the rank must not stay behind.
  if command -v setpriv >/dev/null; then own=(setpriv --pdeathsig KILL); fi
  trap 'asked=yes; kill -TERM "$rank" 2>/dev/null || true' TERM INT HUP # this is how the agent ends its ranks
  "${own[@]}" "$@" &
  rank=$!
  while kill -0 "$rank" 2>/dev/null; do # `wait` returns early when this process gets a signal
    status=0
    wait "$rank" || status=$?
  done
  if [ "$status" -le 128 ] || [ "$asked" = yes ] || [[ " ${ESSENTIAL-0} " = *" $RANK "* ]]; then
    exit "$status"
  fi
  printf 'torchrun_survivors.sh: rank %s was ended by signal %s (%s); the others go on without it\n' \
    "$RANK" "$((status - 128))" "$(kill -l "$status")" >&2
}

[[ ${ESSENTIAL-0} =~ ^([0-9]+( [0-9]+)*)?$ ]] ||
  fail "ESSENTIAL must be ranks with a space between them, or empty, got '$ESSENTIAL'"
if [ "${1:-}" = --rank ]; then
  shift
  run_rank "$@"
  exit
fi

if [ -n "${NODES:-}" ]; then
  : "${NODE_RANK:?this host\'s number, from 0}" "${MASTER:?address of host 0}"
  where=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER" --master-port "${PORT:-29500}")
else
  : "${RANKS:?number of ranks on this machine, or NODES: number of hosts}"
  where=(--standalone)
fi
[ $# -gt 0 ] || fail "there is no script to start"
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
case $1 in
  *.py | -m) set -- python "$@" ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores of a host
exec python -m torch.distributed.run "${where[@]}" --nproc-per-node "${RANKS:-1}" \
  --no-python bash "${BASH_SOURCE[0]}" --rank "$@"
