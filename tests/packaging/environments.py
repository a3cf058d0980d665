"""Environments for installing into: they see torch and what it needs, from where it is, and nothing else."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(*names):
    """The distributions of these names and of all that they need, as far as they are installed."""
    found, seen, todo = {}, set(), [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        needs = map(Requirement, found[name].requires or [])
        todo += [need for need in needs if any(_holds(need, extra) for extra in extras | {""})]
    return found.values()


def _holds(requirement, extra):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def link(distributions, folder):
    """Links what was installed for them into a folder, to be imported from there without a copy of it."""
    folder.mkdir()
    for distribution in distributions:
        for name in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(distribution.locate_file(name))


class Environment:
    """A new virtual environment in a folder, which sees the linked packages behind its own."""

    def __init__(self, folder, linked):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        (self.packages / "linked.pth").write_text(f"{linked}\n")

    def pip(self, *arguments, **environment):
        """Runs the pip of these tests on the environment."""
        return run(sys.executable, "-m", "pip", "--python", self.python, *arguments, **environment)

    def run(self, code):
        """What a script of its Python writes."""
        return run(self.python, "-c", code, cwd="/")


def run(*command, cwd=None, timeout=600, **environment):
    """Runs a command to its end, which must be a good one; what it wrote."""
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**without, "OMP_NUM_THREADS": "1", **environment}, timeout=timeout,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout
