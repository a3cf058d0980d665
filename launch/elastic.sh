#!/usr/bin/env bash
# Starts a training script that survives dead workers and hosts that come and go. Run the same line on every host:
#
#     MASTER=10.0.0.1 MIN_NODES=1 MAX_NODES=4 launch/elastic.sh examples/ddp_dgc.py --checkpoints /shared/run1
#
# When a worker dies or a host joins or leaves, torchrun stops all workers and starts the script again; the script goes
# on from its newest checkpoint. The checkpoints must lie in a folder that all hosts share.
#
# What to change:
#     MASTER           an address of one host, which must stay, that all hosts reach; PORT a free port there (29400)
#     MIN_NODES        with fewer hosts the job waits (default: 1)
#     MAX_NODES        more are not taken in (default: 1)
#     RANKS            number of ranks on each host (default: 1)
#     RESTARTS         how often workers may be started again (default: 3)
#     JOB              a name that the hosts of one run have in common (default: distopt)
#     INTERFACE        the network to train over (eth0, ...), on hosts with several
#     ADDRESS          this host's own address, where the others cannot look its name up
#     OMP_NUM_THREADS  threads of each rank (default: 1)
set -euo pipefail
: "${MASTER:?address of the host where workers meet}" "${1:?the script to start}"
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without this, workers that start again find the addresses of the dead ones in the store and cannot connect (seen with
# torch 2.13 on gloo; pytorch issue 135712). With it each start has a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec python -m torch.distributed.run \
  --nnodes "${MIN_NODES:-1}:${MAX_NODES:-1}" --nproc-per-node "${RANKS:-1}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER:${PORT:-29400}" --rdzv-id "${JOB:-distopt}" \
  ${ADDRESS:+--local-addr "$ADDRESS"} \
  "$@"
