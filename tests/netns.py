"""Hosts of the test run's own, made by launch/netns_cluster.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "netns_cluster.sh"
NAME = f"t{os.getpid()}"
DEADLINE_S = 120
# For a real torchrun on the hosts: the Python and the package under test.
REAL = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(SCRIPT.parents[1]),
}


def why_not():
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "iproute2 is not installed"
    probe = f"distopt-{NAME}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"cannot make a network namespace: {made.stderr.strip()}" if made.returncode else ""


REASON = why_not()
needs_namespaces = pytest.mark.skipif(bool(REASON), reason=REASON or "can make them")


def command(*arguments, name=NAME):
    return ["bash", str(SCRIPT), "--name", name, *map(str, arguments)]


def cluster(*arguments, name=NAME, deadline_s=DEADLINE_S, **settings):
    return subprocess.run(
        command(*arguments, name=name), capture_output=True, text=True, timeout=deadline_s, check=False, **settings
    )


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.split()[0].startswith(f"distopt-{NAME}")}
