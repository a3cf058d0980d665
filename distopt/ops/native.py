"""Loads the native kernels, once, when imported, and knows which of their CPU paths is in use.

The environment variable DISTOPT_CPU_CAPABILITY forces a path: scalar, avx2, avx512, or reference (torch alone). A value
that is unknown, or that this machine or build lacks, is a ConfigError. Without the native library everything runs on
the reference, and the first operation says so in one warning on the logger "distopt".
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from distopt.errors import ConfigError
from distopt.ops import schemas

VARIABLE = "DISTOPT_CPU_CAPABILITY"
REFERENCE = "reference"
PATHS = ("scalar", "avx2", "avx512")  # in the order of csrc/cpu/kernels.h; each machine has all up to its best

_log = logging.getLogger("distopt")


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What does the work on CPU tensors, and why."""

    backend: str  # "scalar", "avx2", "avx512" or "reference"
    available: tuple[str, ...]  # the values that DISTOPT_CPU_CAPABILITY may take here
    library: str | None  # file of the native kernels, None without them
    problem: str | None  # why there are none, None if there are or if the reference was asked for


def use_path(name: str) -> None:
    """Runs the native kernels on this path from now on, in all threads (for tests and benchmarks).

    Raises:
        ConfigError: this machine or build has no such path.
    """
    if name not in _available[1:]:
        raise ConfigError(f"the CPU path must be one of {', '.join(_available[1:]) or 'none here'}, got {name!r}")
    torch.ops.distopt._cpu_path(PATHS.index(name))


def backend() -> str:
    """What does the work on CPU tensors: "avx512", "avx2", "scalar" or "reference"."""
    return PATHS[torch.ops.distopt._cpu_path(-1)] if len(_available) > 1 else REFERENCE


def build_info() -> BuildInfo:
    """Everything that a bug report needs about the kernels."""
    library = str(_library) if _library is not None and _problem is None else None
    return BuildInfo(backend=backend(), available=_available, library=library, problem=_problem)


def announce() -> None:
    """Says once that there are no native kernels, unless the reference was asked for."""
    global silent
    silent = True
    _log.warning(
        "distopt runs on its reference in torch (same results, slower): %s; install a C++17 compiler, then "
        "`pip install --no-build-isolation --no-deps --force-reinstall -v .` in a clone shows what the build says",
        _problem,
    )


def _find_library() -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


def _load(library: Path | None) -> str | None:
    """Registers the kernels; the reason if that is not possible."""
    if library is None:
        return "the native kernels were not built"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load ({str(error).splitlines()[0]})"
    return None


def _choose(asked: str) -> None:
    if asked not in (REFERENCE, *PATHS):
        raise ConfigError(
            f"{VARIABLE} must be one of {', '.join((*PATHS, REFERENCE))}, got {asked!r}; unset it for the best"
        )
    if asked not in _available:
        why = _problem or f"this processor has {', '.join(_available[1:])}"
        raise ConfigError(f"{VARIABLE}={asked} is not available here: {why}; unset it for the best")
    if asked != REFERENCE:
        use_path(asked)


_asked = os.environ.get(VARIABLE, "").strip().lower()
_library = _find_library()
_problem = None if _asked == REFERENCE else _load(_library)
_available: tuple[str, ...] = (REFERENCE,)
if _asked != REFERENCE and _problem is None:
    _available += PATHS[: torch.ops.distopt._cpu_path(-1) + 1]
if _asked:
    _choose(_asked)

silent = _problem is None  # read by the dispatch on each call

__all__ = ["PATHS", "REFERENCE", "VARIABLE", "BuildInfo", "announce", "backend", "build_info", "schemas", "use_path"]
