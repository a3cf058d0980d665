"""How MPI starts in this process, and how it ends in a job that has lost ranks.

`MPI_Finalize` waits for every rank that MPI believes alive, and in a job that has lost one it may wait for ever: under
`mpirun --enable-recovery` MPI is told of no death; under `--with-ft ulfm`, with Open MPI 5.0, not of a rank that ended
with an error status and without a word (`os._exit(1)`), and after a death in the middle of a message it hung in 2 of 16
runs although it had been told. So a rank that knows of a death, from MPI or from the kernel, leaves MPI unfinalized,
which mpirun takes for a normal end under either option.

mpi4py decides when it is imported whether it will finalize MPI, so distopt must import it first to do that itself.

Limits: where the script has imported `mpi4py.MPI` before, that hang remains, and a warning says so. A rank that dies
while others are in `MPI_Finalize` already may keep them there.
"""

import atexit
import logging
import os
import sys
from types import ModuleType
from typing import Any

from distopt.comm.neighbours import Neighbours
from distopt.errors import CompatibilityError

_log = logging.getLogger("distopt")


def load_mpi() -> ModuleType:
    """The module `mpi4py.MPI`, with MPI started. Import it this way, so that the process ends well (see above).

    Raises:
        CompatibilityError: mpi4py or MPI is missing, MPI has not started or has ended, or it knows no threads.
    """
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules and mpi4py.rc.finalize is None:
            mpi4py.rc.finalize = False
            _ends.append(os.getpid())
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise CompatibilityError(
            f"MPI cannot be used here: {error}; pip install 'torch-distopt[mpi]', which brings mpi4py and Open MPI"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise CompatibilityError(
            "MPI is not running in this process; use it between MPI.Init() and MPI.Finalize(), or leave "
            "mpi4py.rc.initialize as it is"
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise CompatibilityError(
            f"MPI was started with thread level {MPI.Query_thread()}, and MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE}) "
            "is needed, because messages have a thread of their own; leave mpi4py.rc.thread_level as it is"
        )
    runtime: ModuleType = MPI  # of no known type where mpi4py is missing
    return runtime


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

    def all(self) -> frozenset[int]:
        """Ranks that are dead by either account."""
        return self.ended() | self.acknowledge()


_every: list[Deaths] = []
_ends: list[int] = []  # this process, if ending MPI is up to distopt and not to mpi4py


@atexit.register
def _end() -> None:
    """Runs before mpi4py's own end, which is no function of Python's."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    ours = os.getpid() in _ends  # a fork is no rank
    dead = frozenset[int]().union(*(deaths.all() for deaths in _every))
    if not dead:
        if ours:
            mpi.Finalize()
    elif ours:
        _log.info("MPI is not finalized, because ranks have ended: %s", ", ".join(map(str, sorted(dead))))
    else:
        _log.warning(
            "the end may hang in MPI_Finalize, because ranks have ended: %s; let distopt import mpi4py: call "
            "distopt.comm.load_mpi() before the first import of mpi4py.MPI",
            ", ".join(map(str, sorted(dead))),
        )
