#!/usr/bin/env bash
# Starts a training script by DeepSpeed's own launcher, on this machine or on the hosts of a hostfile:
#
#     RANKS=2 launch/deepspeed.sh examples/deepspeed_dgc.py --deepspeed_config launch/deepspeed/dgc.json
#     HOSTFILE=hosts launch/deepspeed.sh examples/deepspeed_dgc.py --deepspeed_config launch/deepspeed/dgc.json
#
# What to change:
#     RANKS            number of ranks on each host; on a host with GPUs one for each
#     HOSTFILE         lines of "address slots=4", hosts that this one can log in to by ssh; without it this host alone
#     INTERFACE        where hosts have several networks, the one to train over (eth0, ...)
#     OMP_NUM_THREADS  threads of each rank (default: 1; the launcher would leave every rank all cores)
#     DS_ACCELERATOR   cpu, cuda, ... (default: what DeepSpeed finds)
#     PORT             a free port on the first host (default: 29500)
#     DRY_RUN=1        print the command in place of running it
# The launcher gives the script --local_rank, which it must accept. torchrun_local.sh starts the same script without.
set -euo pipefail
: "${1:?the script to start}"
fail() {
  printf 'deepspeed.sh: %s\n' "$*" >&2
  exit 2
}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
where=(--master_port "${PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
  [ -r "$HOSTFILE" ] || fail "HOSTFILE must be a file that can be read, got '$HOSTFILE'"
  where+=(--hostfile "$HOSTFILE")
else
  : "${RANKS:?number of ranks, or HOSTFILE}"
  where+=(--hostfile /dev/null/none) # a file that is not there: otherwise the launcher looks for /job/hostfile
fi
if [ -n "${RANKS:-}" ]; then
  [[ $RANKS =~ ^[1-9][0-9]{0,4}$ ]] || fail "RANKS must be a number of ranks, got '$RANKS'"
  where+=(--num_accelerators "$RANKS")
fi
command=(deepspeed "${where[@]}" "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' env "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
