"""Which process of a job is what: rank 0 serves, every other rank is a site, or one of several that share a site.

Under torchrun the ranks are those of torch.distributed, which is initialised here if the script has not done it; under
mpirun those of MPI. By TCP a server listens at an address, and every site says which rank it is.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from distopt.comm import Sealed, TCPPeer, TCPServer, Transport, end_quietly, find_job, read_secret
from distopt.config import check_count, check_number
from distopt.errors import CompatibilityError, ConfigError
from distopt.federated.network.letters import SERVER

CLOSE_S = 10.0  # for what is queued when a process ends
_RANK_VARIABLES = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Seat:
    """Of this process.

    Attributes:
        rank: Its number in the job.
        size: How many processes there are.
        ranks_per_site: How many share a site.
        open: From the length of the longest frame to the transport. Collective where the ranks are those of a launcher.
        may_return: Whether who is lost may come back.
        group: The ranks of this site, if it has several.
    """

    rank: int
    size: int
    ranks_per_site: int
    open: Callable[[int], Transport]
    may_return: bool = False
    group: dist.ProcessGroup | None = None

    @property
    def serves(self) -> bool:
        """Whether this is the server."""
        return self.rank == SERVER

    @property
    def leads(self) -> bool:
        """Whether this process speaks with the server for its site."""
        return self.rank in self.leaders

    @property
    def num_sites(self) -> int:
        """How many sites the job has."""
        return (self.size - 1) // self.ranks_per_site

    @property
    def site(self) -> int:
        """Which of them this process is of."""
        return (self.rank - 1) // self.ranks_per_site

    @property
    def leaders(self) -> list[int]:
        """The ranks that the server speaks with."""
        return list(range(1, self.size, self.ranks_per_site))


def launched_rank() -> int | None:
    """The rank of this process in the job of several processes that torchrun or mpirun started; None outside of one.

    Rank 0 is to call `serve`, every other one `take_part`.
    """
    if dist.is_initialized():
        return dist.get_rank() if dist.get_world_size() > 1 else None
    for rank, size in _RANK_VARIABLES:
        if rank in os.environ and int(os.environ.get(size, "1")) > 1:
            return int(os.environ[rank])
    return None


def find_seat(
    transport: str | Transport = "auto",
    *,
    ranks_per_site: int = 1,
    wait_s: float = 60.0,
    secret: bytes | None = None,
) -> Seat:
    """The seat of this process in the job that a launcher started, or in that of an open transport.

    Args:
        transport: "gloo", "mpi", a transport that is open already, or "auto" for the one of the launcher.
        ranks_per_site: More than one: these train each client's batches together; gloo only.
        wait_s: How long the ranks may take to find each other.
        secret: Of the job; every frame is authenticated with it. That of the environment if left out.

    Raises:
        ConfigError: Nothing says what job this is, or its ranks cannot be shared out.
        CompatibilityError: mpi4py is missing.
    """
    check_count("ranks_per_site", ranks_per_site, low=1, remedy="use 1 where each process is a site")
    secret = read_secret() if secret is None else secret
    launched = all(name in os.environ for name in _LAUNCHED)
    if transport in ("auto", "gloo") and launched and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=max(wait_s, 1.0)))
        end_quietly()
    job = find_job(transport)
    if job.size < 2:
        raise ConfigError(
            f"a job must have a server and at least one site, got {job.size} process; start at least 2, or use "
            "Simulation for all clients in one process"
        )
    if (job.size - 1) % ranks_per_site:
        raise ConfigError(
            f"the {job.size - 1} ranks beside the server must be a multiple of ranks_per_site, {ranks_per_site}; start "
            f"{1 + ranks_per_site * -(-(job.size - 1) // ranks_per_site)} processes"
        )
    group = _own_group(job.rank, job.size, ranks_per_site)
    leaders = range(1, job.size, ranks_per_site)
    peers = list(leaders) if job.rank == SERVER else [SERVER] if job.rank in leaders else []

    def opened(longest: int) -> Transport:
        if secret is None:
            return job.open(longest, peers)
        return Sealed(job.open(longest + Sealed.OVERHEAD_BYTES, peers), secret)

    may_return = isinstance(transport, TCPServer | TCPPeer)
    return Seat(job.rank, job.size, ranks_per_site, opened, may_return=may_return, group=group)


def serve_by_tcp(listen: str, sites: int | None, *, secret: bytes | None = None) -> Seat:
    """The server's seat in a job whose sites connect to an address.

    Raises:
        ConfigError: The number of sites is not given.
    """
    size = 1 + _num_sites(sites)
    secret = read_secret() if secret is None else secret
    return Seat(
        SERVER, size, 1, lambda longest: TCPServer(listen, size=size, max_frame_bytes=longest, secret=secret), True
    )


def join_by_tcp(
    server: str,
    rank: int | None,
    sites: int | None,
    *,
    secret: bytes | None = None,
    wait_s: float,
    patience_s: float,
) -> Seat:
    """A site's seat in a job whose server listens at an address.

    Raises:
        ConfigError: The rank or the number of sites is not given.
    """
    size = 1 + _num_sites(sites)
    secret = read_secret() if secret is None else secret
    if rank is None:
        raise ConfigError(
            f"rank must be given beside server={server!r}, got None; number the sites from 1 to {size - 1}"
        )
    check_count("rank", rank, low=1, remedy="rank 0 is the server")

    def opened(longest: int) -> Transport:
        return TCPPeer(
            server,
            rank=rank,
            size=size,
            max_frame_bytes=longest,
            secret=secret,
            connect_timeout_s=wait_s,
            patience_s=patience_s,
        )

    return Seat(rank, size, 1, opened, True)


def _num_sites(sites: int | None) -> int:
    if sites is None:
        raise ConfigError("sites must be given for a job by TCP, got None; say how many sites it has, on every process")
    check_count("sites", sites, low=1, remedy="say how many sites the job has")
    return sites


def _own_group(rank: int, size: int, ranks_per_site: int) -> dist.ProcessGroup | None:
    """Collective over all ranks."""
    if ranks_per_site == 1:
        return None
    if not dist.is_initialized() or dist.get_world_size() != size:
        raise CompatibilityError(
            "sites of several ranks need torch.distributed, got a job without; start it with torchrun, or use "
            "ranks_per_site=1"
        )
    own = None
    for first in range(1, size, ranks_per_site):
        members = list(range(first, first + ranks_per_site))
        made = dist.new_group(members, backend="gloo", timeout=timedelta(days=1))
        if rank in members:
            own = made
    return own


def check_serves(seat: Seat) -> None:
    """Raises `ConfigError` unless this process is to serve."""
    if not seat.serves:
        raise ConfigError(
            f"rank {SERVER} serves and every other rank takes part, got serve on rank {seat.rank} of {seat.size}; call "
            "take_part there"
        )


def check_takes_part(seat: Seat) -> None:
    """Raises `ConfigError` if this process is to serve."""
    if seat.serves:
        raise ConfigError(
            f"rank {SERVER} serves and every other rank takes part, got take_part on rank {SERVER}; call serve there"
        )


def check_one_way(transport: str | Transport, ranks_per_site: int, **address: str | None) -> None:
    """Raises `ConfigError` if a transport is given beside an address, or sites of several ranks."""
    ((name, given),) = address.items()
    if given is not None and transport != "auto":
        raise ConfigError(f"one of transport and {name} says how processes talk, got both; leave transport out")
    if given is not None and ranks_per_site != 1:
        raise ConfigError(
            f"ranks_per_site must be 1 beside {name}, got {ranks_per_site}; sites of several ranks are torchrun's"
        )


def check_seconds(**seconds: float) -> None:
    """Raises `ConfigError` unless each is a number above 0."""
    for name, value in seconds.items():
        check_number(name, value, rule="a number of seconds above 0", remedy="use 60.0", low=0.0, high=1e9)
