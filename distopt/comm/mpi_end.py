"""How MPI ends in a job that has lost ranks.

mpi4py calls `MPI_Finalize` when Python shuts down, and that waits for every rank that MPI believes alive. Where MPI was
started to tolerate faults (`mpirun --with-ft ulfm`) it knows who is dead. Where it was not (`--enable-recovery` alone)
it would wait for ever: so the kernel is asked who has ended, and MPI is left unfinalized then, which `mpirun
--enable-recovery` takes for a normal end.

Limits: a rank that dies while others are in `MPI_Finalize` already keeps them there, except under `--with-ft ulfm`.
"""

import atexit
import logging
import time
from typing import Any

from distopt.comm.neighbours import Neighbours

_log = logging.getLogger("distopt")

_PATIENCE_S = 1.0  # how long MPI may take to learn of a death that the kernel knows
_POLL_S = 0.01


class Deaths:
    """Which ranks of a communicator are dead, as MPI and as the kernel know it; stays until the process ends.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: The communicator, whose errors are returned. Making this is a collective over it.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi = mpi
        self._comm = comm
        own = bytearray(Neighbours.own_card())
        cards = bytearray(len(own) * comm.Get_size())
        comm.Allgather(own, cards)
        others = set(range(comm.Get_size())) - {comm.Get_rank()}
        self._neighbours = Neighbours({r: bytes(cards[r * len(own) : (r + 1) * len(own)]) for r in others})
        self._rank = comm.Get_rank()
        self._told: frozenset[int] = frozenset()
        _every.append(self)

    def ended(self) -> frozenset[int]:
        """Ranks on this machine whose process has ended. Never waits, makes no MPI calls."""
        return self._neighbours.ended()

    def acknowledge(self) -> frozenset[int]:
        """Ranks that MPI says have failed; from now on a receive from any source goes on without them."""
        try:
            failed = self._comm.Get_failed()
            number = failed.Get_size()
            self._comm.Ack_failed(number)
            if number:
                ranks = failed.Translate_ranks(list(range(number)), self._comm.Get_group())
                self._told = frozenset(int(rank) for rank in ranks)
        except (self._mpi.Exception, NotImplementedError):  # an MPI without fault tolerance
            return self._told
        return self._told

    def unknown_to_mpi(self) -> frozenset[int]:
        """Ranks that the kernel says have ended and MPI believes alive, after giving it some time."""
        end = time.monotonic() + _PATIENCE_S
        while (unknown := self.ended() - self._told) and time.monotonic() < end:
            time.sleep(_POLL_S)
            self.acknowledge()
        return unknown

    def has_senior(self, gone: frozenset[int]) -> bool:
        """Whether a lower rank is left, which then speaks for all."""
        return not gone.issuperset(range(self._rank))


_every: list[Deaths] = []


@atexit.register
def _settle() -> None:
    """Runs before mpi4py's own end, which is no function of Python's."""
    for deaths in _every:
        if deaths._mpi.Is_finalized():
            return
        if unknown := deaths.unknown_to_mpi():
            import mpi4py

            mpi4py.rc.finalize = False
            _log.log(
                logging.INFO if deaths.has_senior(unknown) else logging.WARNING,
                "MPI is not finalized, because it would wait for ranks that have ended: %s; start the job with "
                "mpirun --with-ft ulfm, and MPI notices by itself",
                ", ".join(map(str, sorted(unknown))),
            )
            return
