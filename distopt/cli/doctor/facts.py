"""What one process can say of itself and its host without asking anybody."""

import os
import platform
import resource
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from distopt import ops
from distopt.comm.address import interface_address, is_loopback, own_address
from distopt.version import __version__

_CGROUP = Path("/sys/fs/cgroup")


def collect(towards: str | None) -> dict[str, Any]:
    """Versions, host, addresses, memory, cores and limits of this process, as plain values for JSON.

    Args:
        towards: A host that all reach, for the way there; None where there is none.
    """
    gloo, how = gloo_address()
    return {
        "host": socket.gethostname(),
        "host_id": host_id(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "distopt": __version__,
            "numpy": numpy.__version__,
        },
        "kernels": ops.backend(),
        "interfaces": interfaces(),
        "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "gloo_address": gloo,
        "gloo_how": how,
        "routed_address": routed_address(towards),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **memory(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "gpus": torch.cuda.device_count(),
    }


def host_id() -> str:
    """The same for processes of one host, another on every other host; a network namespace counts as one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{socket.gethostname()}"
    except OSError:
        return socket.gethostname()


def interfaces() -> list[dict[str, Any]]:
    """Networks of this host: name, IPv4 address (None without), whether it is up, MTU, and Mbit/s where it tells."""
    return [
        {
            "name": folder.name,
            "address": _address_of(folder.name),
            "up": _read(folder / "operstate") in ("up", "unknown"),  # the loopback says "unknown"
            "mtu": _number(_read(folder / "mtu")),
            "mbit_per_s": _number(_read(folder / "speed")),
        }
        for folder in sorted(Path("/sys/class/net").glob("*"))
    ]


def gloo_address() -> tuple[str | None, str]:
    """The address that gloo gives to the other ranks, and why; None where it will find none.

    As torch does it: the interface that GLOO_SOCKET_IFNAME names, else what this host's name means, else the loopback.
    """
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if names:
        try:
            return own_address(None), f"GLOO_SOCKET_IFNAME={names}"
        except OSError:
            return None, f"GLOO_SOCKET_IFNAME={names}, which has no IPv4 address here"
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
        return address, f"what the host name {name} means"
    except OSError as error:
        return "127.0.0.1", f"the loopback, since the host name {name} means no address of this host ({error})"


def routed_address(towards: str | None) -> str | None:
    """The address on the way to that host; the one that is not the loopback where there is none to go by."""
    try:
        if towards is not None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((towards, 9))  # sends nothing
                return str(probe.getsockname()[0])
    except OSError:
        pass
    addresses = [each["address"] for each in interfaces() if each["address"] and each["up"]]
    return next((address for address in addresses if not is_loopback(address)), next(iter(addresses), None))


def probing_address(facts: Mapping[str, Any]) -> str:
    """Where a host is reached: at the address that gloo gives out, unless that is of no use to other hosts."""
    gloo: str | None = facts["gloo_address"]
    if gloo is not None and not is_loopback(gloo):
        return gloo
    return facts["routed_address"] or "127.0.0.1"


def cores() -> float:
    """Cores that this process may use: by its affinity, and by the limit of its control group."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return min(allowed, int(quota) / int(period))
    return allowed


def memory() -> dict[str, int | None]:
    """Bytes of this host, those that are free for it, and the limit of the control group, None for none."""
    known = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    total, free = (1024 * int(known.get(key, "0 kB").split()[0]) for key in ("MemTotal", "MemAvailable"))
    limit = _number(_read(_CGROUP / "memory.max"))
    if limit is not None:
        free = min(free, max(0, limit - (_number(_read(_CGROUP / "memory.current")) or 0)))
    return {"memory_bytes": total, "memory_free_bytes": free, "memory_limit_bytes": limit}


def _address_of(name: str) -> str | None:
    try:
        return interface_address(name)
    except OSError:
        return None


def _read(path: Path) -> str:
    """The text of a file of the kernel's; empty where it has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
