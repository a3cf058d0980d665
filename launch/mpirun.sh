#!/usr/bin/env bash
# Starts a training script on several ranks with mpirun (Open MPI 5) so that the others outlive a rank that is killed:
#
#     RANKS=5 launch/mpirun.sh examples/coded_training.py                       # all on this machine
#     RANKS=8 HOSTS=hosts.txt launch/mpirun.sh examples/coded_training.py       # on the hosts listed in a file
#     MPIRUN_OPTIONS="--mca btl_tcp_if_include eth0" RANKS=5 launch/mpirun.sh train.py
#
# A line of HOSTS is `name slots=2`: that host takes two ranks and is reached by ssh, no password asked. Open MPI and
# the script lie at the same place everywhere. DEADLINE ends the job after so many seconds, with an error.
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
: "${RANKS:?number of ranks}" "${1:?the script to start}"
fail() {
  printf 'mpirun.sh: %s\n' "$*" >&2
  exit 2
}
[[ $RANKS =~ ^[1-9][0-9]{0,4}$ ]] || fail "RANKS must be a number of ranks, got '$RANKS'"
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
command -v mpirun >/dev/null || fail "there is no mpirun; pip install 'torch-distopt[mpi]'"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores of a host
# shellcheck disable=SC2086  # several options are meant
exec mpirun "${options[@]}" ${MPIRUN_OPTIONS:-} "$@"
