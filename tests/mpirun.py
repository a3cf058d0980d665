"""Ranks that a real mpirun has started, for tests: with a deadline, and with all that they printed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240
# The package that pip installs has its mpirun beside the Python; that one fits mpi4py before any other on the machine.
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def why_not():
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed; make setup-mpi"
    return "" if MPIRUN else "there is no mpirun; make setup-mpi"


REASON = why_not()
needs_mpi = pytest.mark.skipif(bool(REASON), reason=REASON or "can start ranks")


def start(size, script, *options, arguments=()):
    """Starts `size` ranks of a script on this machine; output and errors are one text."""
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    ranks = ["-n", str(size), *as_root, "--oversubscribe", "--bind-to", "none", *options]
    return subprocess.Popen(
        [MPIRUN, *ranks, sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip


def finish(job, deadline_s=DEADLINE_S):
    """What the ranks printed; the job's `returncode` is then known. A job that misses the deadline is ended."""
    try:
        return job.communicate(timeout=deadline_s)[0]
    except subprocess.TimeoutExpired:
        job.terminate()  # mpirun ends its ranks
        try:
            said = job.communicate(timeout=10)[0]
        except subprocess.TimeoutExpired:
            job.kill()
            said = "and mpirun did not end"
        raise AssertionError(f"no end within {deadline_s} s:\n{said}") from None
