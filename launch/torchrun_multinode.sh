#!/usr/bin/env bash
# Starts a training script on several hosts by torchrun. Run the same line on every host, with its own number:
#
#     NODE_RANK=0 NODES=2 MASTER=10.0.0.1 launch/torchrun_multinode.sh examples/ddp_dgc.py --epochs 10
#     NODE_RANK=1 NODES=2 MASTER=10.0.0.1 launch/torchrun_multinode.sh examples/ddp_dgc.py --epochs 10
#
# or, where hosts have no numbers, the very same line everywhere: they meet and are numbered by torchrun.
#
#     RENDEZVOUS=c10d NODES=2 MASTER=10.0.0.1 launch/torchrun_multinode.sh examples/ddp_dgc.py --epochs 10
#
# What to change:
#     NODES            number of hosts
#     MASTER           an address of the first host (c10d: of any one of them) that all hosts reach
#     NODE_RANK        this host's number, from 0; static rendezvous only
#     RANKS            number of ranks on this host (default: 1); c10d wants the same everywhere
#     PORT             a port of MASTER that is free and that firewalls let pass (default: 29500)
#     INTERFACE        the network to train over (eth0, ...), on hosts with several: the slow link is the one to name
#     OMP_NUM_THREADS  threads of each rank (default: the cores of this host, shared out)
#     RENDEZVOUS       static (default) or c10d
#     JOB              c10d: a name that the hosts of one run have in common (default: distopt)
#     ADDRESS          c10d: this host's own address, where the others cannot look its name up
#     DRY_RUN=1        print the command in place of running it
# With c10d and RESTARTS workers are started again after a failure, and hosts may come and go: that is elastic.sh.
# Before a long run, the same line with `-m distopt.cli doctor` in the place of the script says what is wrong, if it is.
set -euo pipefail
: "${NODES:?number of hosts}" "${MASTER:?address of the host where all meet}" "${1:?the script to start}"
fail() {
  printf 'torchrun_multinode.sh: %s\n' "$*" >&2
  exit 2
}
[[ $NODES =~ ^[1-9][0-9]{0,4}$ ]] || fail "NODES must be a number of hosts, got '$NODES'"
[[ ${RANKS:-1} =~ ^[1-9][0-9]{0,4}$ ]] || fail "RANKS must be a number of ranks, got '$RANKS'"
options=(--nnodes "$NODES" --nproc-per-node "${RANKS:-1}")
case ${RENDEZVOUS:-static} in
  static)
    : "${NODE_RANK:?this host\'s number, from 0, or RENDEZVOUS=c10d}"
    options+=(--node-rank "$NODE_RANK" --master-addr "$MASTER" --master-port "${PORT:-29500}")
    ;;
  c10d)
    [ -z "${NODE_RANK:-}" ] || fail "hosts have no numbers with c10d, got NODE_RANK=$NODE_RANK; leave it out"
    options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER:${PORT:-29500}" --rdzv-id "${JOB:-distopt}")
    [ -z "${ADDRESS:-}" ] || options+=(--local-addr "$ADDRESS")
    ;;
  *) fail "RENDEZVOUS must be static or c10d, got '$RENDEZVOUS'" ;;
esac
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
share=$(($(nproc) / ${RANKS:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}
command=(python -m torch.distributed.run "${options[@]}" "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' env "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
