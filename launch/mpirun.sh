#!/usr/bin/env bash
# Starts a training script on several ranks with mpirun (Open MPI 5) so that the others outlive a rank that is killed:
#
#     RANKS=5 launch/mpirun.sh examples/coded_training.py                       # all on this machine
#     RANKS=8 HOSTS=hosts.txt launch/mpirun.sh examples/coded_training.py       # on the hosts listed in a file
#     MASTER=127.0.0.1 RANKS=2 launch/mpirun.sh examples/ddp_dgc.py             # a script of torch.distributed
#     MPIRUN_OPTIONS="--mca btl_tcp_if_include eth0" RANKS=5 launch/mpirun.sh train.py
#
# What to change:
#     RANKS            number of ranks
#     HOSTS            a file with a line `name slots=2` for each host: it takes two ranks and is reached by ssh, no
#                      password asked. Open MPI and the script lie at the same place everywhere. Default: this machine
#     MASTER           an address of rank 0's host that all hosts reach, PORT a free port there (default: 29500): ranks
#                      then find what torch.distributed looks for (RANK, WORLD_SIZE, LOCAL_RANK, ...), as under
#                      torchrun. Without it they are of MPI only, which gradient coding uses as it is
#     INTERFACE        the network to train over (eth0, ...), on hosts with several; for gloo, with MASTER
#     DEADLINE         ends the job after so many seconds, with an error (default: none)
#     FAULTS           tolerate (default) or abort, see below
#     OMP_NUM_THREADS  threads of each rank (default: 1)
#
# What this line decides, and why:
#     --enable-recovery    mpirun does not end the job with its first dead rank.
#     --with-ft ulfm       Nor does MPI: a send to a dead rank fails instead of hanging, and a connection (TCP) that
#                          breaks with it does not end the other side. MPI_Finalize may still wait for a dead rank, so
#                          distopt leaves it out then; in a script without distopt set mpi4py.rc.finalize = False.
#                          FAULTS=abort leaves both out: the job ends when a rank is killed.
#     --oversubscribe      where there are more ranks than cores: mpirun refuses that otherwise.
#     --bind-to none       a rank computes in several threads; with two ranks mpirun would give each one core.
#     --allow-run-as-root  for root, whom mpirun refuses otherwise (containers).
# The status is 0 if no rank ended with an error of its own; a killed rank is no error then.
set -euo pipefail
if [ "${1:-}" = --rank ]; then # this script again, as one rank
  shift
  export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK \
    LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE
  exec "$@"
fi
: "${RANKS:?number of ranks}" "${1:?the script to start}"
fail() {
  printf 'mpirun.sh: %s\n' "$*" >&2
  exit 2
}
[[ $RANKS =~ ^[1-9][0-9]{0,4}$ ]] || fail "RANKS must be a number of ranks, got '$RANKS'"
if [ -n "${INTERFACE:-}" ] && [ -z "${MASTER:-}" ]; then
  fail "INTERFACE is for gloo, with MASTER; for MPI's own messages use MPIRUN_OPTIONS='--mca btl_tcp_if_include $INTERFACE'"
fi
options=(-n "$RANKS" --bind-to none)
case ${FAULTS:-tolerate} in
  tolerate) options+=(--with-ft ulfm --enable-recovery) ;;
  abort) ;;
  *) fail "FAULTS must be tolerate or abort, got '$FAULTS'" ;;
esac
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
if [ -n "${HOSTS:-}" ]; then
  [ -r "$HOSTS" ] || fail "HOSTS must be a file that can be read, got '$HOSTS'"
  options+=(--hostfile "$HOSTS" -x OMP_NUM_THREADS -x PATH -x PYTHONPATH)
elif [ "$RANKS" -gt "$(nproc)" ]; then
  options+=(--oversubscribe)
fi
if [ -n "${DEADLINE:-}" ]; then options+=(--timeout "$DEADLINE"); fi
case $1 in
  *.py | -m) set -- python "$@" ;;
esac
if [ -n "${MASTER:-}" ]; then
  export MASTER_ADDR=$MASTER MASTER_PORT=${PORT:-29500}
  if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi
  for name in MASTER_ADDR MASTER_PORT ${INTERFACE:+GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME}; do
    if [ -n "${HOSTS:-}" ]; then options+=(-x "$name"); fi
  done
  set -- bash "$(realpath "${BASH_SOURCE[0]}")" --rank "$@"
fi
command -v mpirun >/dev/null || fail "there is no mpirun; pip install 'torch-distopt[mpi]'"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores of a host
# shellcheck disable=SC2086  # several options are meant
exec mpirun "${options[@]}" ${MPIRUN_OPTIONS:-} "$@"
