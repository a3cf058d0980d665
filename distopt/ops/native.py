"""Loads the native kernels, once, when imported, and knows which of their CPU paths is in use.

The environment variable DISTOPT_CPU_CAPABILITY forces a path: scalar, avx2, avx512, neon, or reference (torch alone).
A value that is unknown, or that this machine or build lacks, is a ConfigError. The kernels for CUDA tensors are a
library of their own, built where torch has CUDA. Without a library its tensors run on the reference, and the first
operation on one says so in one warning on the logger "distopt".
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from distopt.errors import ConfigError, in_a_line
from distopt.ops import schemas

VARIABLE = "DISTOPT_CPU_CAPABILITY"
REFERENCE = "reference"
PATHS = ("scalar", "avx2", "avx512", "neon")  # in the order of csrc/cpu/kernels.h

_log = logging.getLogger("distopt")


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What does the work on CPU and on CUDA tensors, and why."""

    backend: str  # "scalar", "avx2", "avx512", "neon" or "reference"
    available: tuple[str, ...]  # the values that DISTOPT_CPU_CAPABILITY may take here
    library: str | None  # file of the native kernels, None without them
    problem: str | None  # why there are none, None if there are or if the reference was asked for
    cuda_library: str | None  # file of the kernels for CUDA tensors, None without them
    cuda_problem: str | None  # why there are none, None if there are or if the reference was asked for


@dataclass(frozen=True, kw_only=True)
class SelectionCounts:
    """What the native selections of this process did so far, in all threads; all zero without the native build.

    Differences between two calls say what happened in between: in steady state `workspace_growths` stays as it is, and
    on continuous data `second_collections` is far below one in a hundred `selections`.
    """

    selections: int  # tensors and segments that were selected from (k > 0); all owners of a tensor count once
    second_collections: int  # the tensor was read once more because a sample had misled
    full_buffers: int  # a buffer of candidates filled up before the end: ties, or a sample that had misled
    workspace_growths: int  # allocations of a thread's workspace; results are torch's own allocations


def selection_counts() -> SelectionCounts:
    """Counts since the process started, of all threads."""
    if len(_available) == 1:
        return SelectionCounts(selections=0, second_collections=0, full_buffers=0, workspace_growths=0)
    selections, second_collections, full_buffers, workspace_growths = map(torch.ops.distopt._selection_count, range(4))
    return SelectionCounts(
        selections=selections,
        second_collections=second_collections,
        full_buffers=full_buffers,
        workspace_growths=workspace_growths,
    )


def use_path(name: str) -> None:
    """Runs the native kernels on this path from now on, in all threads (for tests and benchmarks).

    Raises:
        ConfigError: this machine or build has no such path.
    """
    if name not in _available[1:]:
        raise ConfigError(f"the CPU path must be one of {', '.join(_available[1:]) or 'none here'}, got {name!r}")
    torch.ops.distopt._cpu_path(PATHS.index(name))


def backend() -> str:
    """What does the work on CPU tensors: "avx512", "avx2", "neon", "scalar" or "reference"."""
    return PATHS[torch.ops.distopt._cpu_path(-1)] if len(_available) > 1 else REFERENCE


def build_info() -> BuildInfo:
    """Everything that a bug report needs about the kernels."""
    return BuildInfo(
        backend=backend(),
        available=_available,
        library=str(_library) if _library is not None and _problem is None else None,
        problem=_problem,
        cuda_library=str(_cuda_library) if has_cuda_kernels() else None,
        cuda_problem=_cuda_problem,
    )


def has_cuda_kernels() -> bool:
    """Whether operations on CUDA tensors run on the kernels of this package."""
    return _cuda_library is not None and _cuda_problem is None and _asked != REFERENCE


def announce(device: torch.device) -> None:
    """Says once that there are no native kernels for tensors on this kind of device, unless that was asked for."""
    global silent
    problem = _unsaid.pop(device.type, None)
    silent = not _unsaid
    if problem is not None:
        _log.warning(
            "distopt runs on its reference in torch for %s tensors (same results, slower): %s; install %s, then "
            "`pip install --no-build-isolation --no-deps --force-reinstall -v .` in a clone shows what the build says",
            device.type.upper(),
            problem,
            "the CUDA toolkit that torch was built for" if device.type == "cuda" else "a C++17 compiler",
        )


def _find_library(stem: str) -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob(f"{stem}.*so"))), None)


def _load(library: Path | None, kind: str) -> str | None:
    """Registers the kernels; the reason if that is not possible."""
    if library is None:
        return f"the {kind} kernels were not built"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load ({in_a_line(error)})"
    return None


def _has_path(path: int) -> bool:
    """Whether this machine has it; leaves the choice as it was."""
    before = torch.ops.distopt._cpu_path(-1)
    found: bool = torch.ops.distopt._cpu_path(path) == path
    torch.ops.distopt._cpu_path(before)
    return found


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
_library = _find_library("_native")
_problem = None if _asked == REFERENCE else _load(_library, "native")
_cuda_library = _find_library("_native_cuda")
_cuda_problem: str | None = None
if torch.version.cuda is None:
    _cuda_problem = "this torch was built without CUDA"
elif _asked != REFERENCE:
    _cuda_problem = _load(_cuda_library, "CUDA")
_available: tuple[str, ...] = (REFERENCE,)
if _asked != REFERENCE and _problem is None:
    _available += tuple(name for path, name in enumerate(PATHS) if _has_path(path))
if _asked:
    _choose(_asked)

# What the first operation on a tensor of this kind has to say.
_unsaid = {
    device: problem
    for device, problem in (("cpu", _problem), ("cuda", _cuda_problem))
    if problem is not None and (device == "cpu" or torch.version.cuda is not None)
}
silent = not _unsaid  # read by the dispatch on each call

__all__ = [
    "PATHS",
    "REFERENCE",
    "VARIABLE",
    "BuildInfo",
    "SelectionCounts",
    "announce",
    "backend",
    "build_info",
    "has_cuda_kernels",
    "schemas",
    "selection_counts",
    "use_path",
]
