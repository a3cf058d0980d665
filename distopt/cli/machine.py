"""What a measured number depends on: the machine and the versions. Names no host and no path."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distopt import ops
from distopt.version import __version__


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and system."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, torch and distopt, and what runs distopt's operations on CPU tensors."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distopt": __version__,
        "kernels": ops.backend(),
    }


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not installed; imports nothing of it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
