"""Where the ranks of a job meet to be examined: torch's own store, asked with deadlines, so that nobody waits for ever.

A process group needs every rank and every connection before it says a word; a store needs only the way to MASTER_ADDR.
Keys are JSON text.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from torch._C import _distributed_c10d as _c10d

from distopt.cli.doctor.facts import gloo_address, probing_address, routed_address
from distopt.comm import load_mpi
from distopt.errors import ConfigError, PeerLostError

_POLL_S = 0.05
_MPI = {"rank": "OMPI_COMM_WORLD_RANK", "size": "OMPI_COMM_WORLD_SIZE"}


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Which rank of which job this process is.

    Attributes:
        rank: Of this process.
        size: How many there are.
        master: Where they meet; None in a job of one.
        port: There.
        serves: Whether this process holds the store.
    """

    rank: int = 0
    size: int = 1
    master: str | None = None
    port: int = 0
    serves: bool = True


def find_seat(environ: Mapping[str, str] = os.environ) -> Seat:
    """What the launcher says: torchrun, mpirun, or the same variables by hand.

    Raises:
        ConfigError: A variable is missing or no number.
        CompatibilityError: mpirun has started it without MASTER_ADDR, and mpi4py is missing.
    """
    names = {"rank": "RANK", "size": "WORLD_SIZE"}
    if "RANK" not in environ and _MPI["rank"] in environ:
        names = _MPI
    if names["rank"] not in environ:
        return Seat()
    rank, size = (_number(environ, name) for name in names.values())
    if not 0 <= rank < size:
        raise ConfigError(f"{names['rank']} must be in 0 to {size - 1}, got {rank}; give each process its own")
    if size == 1:
        return Seat()
    if "MASTER_ADDR" not in environ and names is _MPI:
        return _by_mpi(rank, size)
    if "MASTER_ADDR" not in environ:
        raise ConfigError(
            "MASTER_ADDR must be an address of rank 0's host that all hosts reach, got none; set it, and MASTER_PORT, "
            "on every host"
        )
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store itself
    port = _number(environ, "MASTER_PORT")
    if not 0 < port <= 65535:
        raise ConfigError(
            f"MASTER_PORT must be a port, 1 to 65535, got {port}; use 29500, or another that is free there"
        )
    return Seat(rank=rank, size=size, master=environ["MASTER_ADDR"], port=port, serves=rank == 0 and not agent)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None or not text.isdecimal():
        raise ConfigError(f"{name} must be a number, got {text!r}; start all processes by one launcher")
    return int(text)


def _by_mpi(rank: int, size: int) -> Seat:
    """MPI has connected the ranks: rank 0 tells where it will hold the store."""
    world = load_mpi().COMM_WORLD
    told = bytearray(256)
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        address = probing_address({"gloo_address": gloo_address()[0], "routed_address": routed_address(None)})
        told[:] = json.dumps([address, port]).encode().ljust(256)
    world.Bcast(told, root=0)
    master, port = json.loads(bytes(told))
    return Seat(rank=rank, size=size, master=str(master), port=int(port), serves=rank == 0)


class Meeting:
    """The store of a job, with an end. Also a context manager.

    Args:
        seat: Of this process.
        deadline_s: Seconds from now after which nothing is waited for; half of them for the store to be there.

    Raises:
        PeerLostError: The host where all meet cannot be reached; says why, and what to do.
    """

    def __init__(self, seat: Seat, *, deadline_s: float) -> None:
        self.seat = seat
        self.deadline_s = deadline_s
        self.end = time.monotonic() + deadline_s
        self._store: Any = None
        if seat.size == 1:
            self._store = _c10d.HashStore()  # torch.distributed has it too, but does not export it
            return
        assert seat.master is not None
        if not seat.serves:
            _await_listener(seat.master, seat.port, self.end - deadline_s / 2)
        try:
            self._store = _c10d.PrefixStore(
                f"distopt-doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
                _c10d.TCPStore(
                    seat.master,
                    seat.port,
                    is_master=seat.serves,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=max(1.0, self.left_s)),
                ),
            )
        except (RuntimeError, ValueError) as error:
            raise _unreachable(seat.master, seat.port, str(error).splitlines()[0]) from error

    @property
    def left_s(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self.end - time.monotonic())

    def tell(self, key: str, value: Any) -> None:
        """Says something under a key, of this rank or of all."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise _gone(error) from error

    def ask(self, key: str, *, within_s: float) -> Any:
        """What was said under a key.

        Raises:
            PeerLostError: Nothing within that time.
        """
        found = self.collect({key: 0}, within_s=within_s)
        if not found:
            raise PeerLostError(f"rank {self.seat.rank} has heard nothing from rank 0 in time; see its output", (0,))
        return found[0]

    def collect(self, keys: Mapping[str, int], *, within_s: float) -> dict[int, Any]:
        """What is said under these keys, by their numbers, once all is there or the time is over."""
        end = min(self.end, time.monotonic() + within_s)
        try:
            while not self._store.check(list(keys)) and time.monotonic() < end:
                time.sleep(_POLL_S)
            return {
                number: json.loads(self._store.get(key)) for key, number in keys.items() if self._store.check([key])
            }
        except RuntimeError as error:
            raise _gone(error) from error

    def line_up(self, key: str, number: int, *, within_s: float) -> bool:
        """Waits until so many have come to this point; False if the time is over first."""
        end = min(self.end, time.monotonic() + within_s)
        try:
            came = self._store.add(key, 1)
            while came < number and time.monotonic() < end:
                time.sleep(_POLL_S)
                came = self._store.add(key, 0)
        except RuntimeError as error:
            raise _gone(error) from error
        return bool(came >= number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._store = None


def rank_keys(name: str, ranks: Iterable[int]) -> dict[str, int]:
    """Keys that each of these ranks says something under."""
    return {f"{name}/{rank}": rank for rank in ranks}


def _await_listener(master: str, port: int, end: float) -> None:
    """Until something listens there. torch's store would say no more than that time was over."""
    said = "nothing was tried"
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((master, port), timeout=min(left, 3.0)).close()
            return
        except TimeoutError:
            said = "no answer, as of a firewall or an address that is not there"
        except ConnectionRefusedError:
            said = "the host answers, but nothing listens there: rank 0 has not started, or has another MASTER_PORT"
        except OSError as error:
            said = str(error)
        time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    raise _unreachable(master, port, said)


def _unreachable(master: str, port: int, said: str) -> PeerLostError:
    return PeerLostError(
        f"{socket.gethostname()} cannot meet the others at {master}:{port} (MASTER_ADDR:MASTER_PORT): {said}; let TCP "
        "pass to that port, or name another address of rank 0's host",
        (0,),
    )


def _gone(error: RuntimeError) -> PeerLostError:
    return PeerLostError(f"the store of the job is gone ({str(error).splitlines()[0]}); see the output of rank 0", (0,))
