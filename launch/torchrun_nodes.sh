#!/usr/bin/env bash
# Starts a training script on several hosts. Run the same line on every host, with its own rank:
#
#     NODE_RANK=0 NODES=2 MASTER=10.0.0.1 launch/torchrun_nodes.sh examples/ddp_dgc.py --epochs 10
#     NODE_RANK=1 NODES=2 MASTER=10.0.0.1 launch/torchrun_nodes.sh examples/ddp_dgc.py --epochs 10
#
# MASTER is an address of host 0 that all hosts reach, PORT a free port there. PROCESSES is the number of ranks on this
# host. On hosts with several networks, INTERFACE (eth0, ...) is the one to train over: the slow link is the one to name.
set -euo pipefail
: "${NODES:?number of hosts}" "${NODE_RANK:?this host\'s number, from 0}" "${MASTER:?address of host 0}"
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores of a host
exec python -m torch.distributed.run \
  --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${PROCESSES:-1}" \
  --master-addr "$MASTER" --master-port "${PORT:-29500}" \
  "$@"
