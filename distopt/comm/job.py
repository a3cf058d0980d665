"""The job that this process belongs to: how many ranks there are, which one this is, and a transport between them."""

import dataclasses
import os
from collections.abc import Callable, Collection

import torch.distributed as dist

from distopt.comm.gloo import GlooTransport
from distopt.comm.mpi import MPITransport
from distopt.comm.mpi_runtime import load_mpi
from distopt.comm.transport import Transport
from distopt.errors import ConfigError

_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclasses.dataclass(frozen=True)
class Job:
    """Ranks that can talk.

    Attributes:
        rank: Of this process.
        size: Number of ranks.
        open: From the length of the longest frame, and the ranks that this one talks to, to the transport.
    """

    rank: int
    size: int
    open: Callable[[int, Collection[int] | None], Transport]


def find_job(transport: str | Transport = "auto", process_group: dist.ProcessGroup | None = None) -> Job:
    """The job by the kind of transport that is asked for.

    Args:
        transport: "gloo", "mpi", a transport that is open already (`TCPPeer`, `Sealed`, ...), or "auto": gloo where
            torch.distributed is initialised, else MPI where mpirun (or another MPI launcher) has started this process.
        process_group: The ranks, for gloo; all by default.

    Raises:
        ConfigError: There is no such transport, or nothing says what job this is.
        CompatibilityError: mpi4py is missing.
    """
    if not isinstance(transport, str):
        opened = transport
        return Job(opened.rank, opened.size, lambda max_frame_bytes, peers: opened)
    if transport == "auto":
        if dist.is_initialized():
            transport = "gloo"
        elif any(name in os.environ for name in _MPI_VARIABLES):
            transport = "mpi"
        else:
            raise ConfigError(
                "this process belongs to no job: torch.distributed is not initialised and no MPI launcher has started "
                'it; call torch.distributed.init_process_group("gloo") under torchrun, or start it with mpirun'
            )
    if transport == "gloo":
        group = process_group or dist.group.WORLD
        if group is None:
            raise ConfigError(
                "transport 'gloo' needs torch.distributed; call torch.distributed.init_process_group first"
            )
        return Job(
            group.rank(),
            group.size(),
            lambda longest, peers: GlooTransport(group, max_frame_bytes=longest, peers=peers),
        )
    if transport == "mpi":
        world = load_mpi().COMM_WORLD
        return Job(
            world.Get_rank(),
            world.Get_size(),
            lambda longest, peers: MPITransport(world, max_frame_bytes=longest, peers=peers),
        )
    raise ConfigError(f"transport must be 'auto', 'gloo', 'mpi' or a transport, got {transport!r}")
