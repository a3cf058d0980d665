"""Each extra installs into an environment of its own, beside torch, and leaves nothing broken there."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from environments import Environment, run

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED = {  # what an extra is for
    "accelerate": "accelerate",
    "cli": "typer, rich, matplotlib, sklearn, distopt.cli.app",
    "deepspeed": "deepspeed",
    "dev": "mypy",
    "docs": "sphinx",
    "flower": "flwr, distopt.integrations.flower",
    "lightning": "lightning",
    "mpi": "mpi4py",
    "privacy": "dp_accounting",
    "sdp": "cvxpy",
    "tensorboard": "tensorboard",
    "test": "pytest, hypothesis",
    "transformers": "transformers, accelerate",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Without native kernels: they need no packages."""
    copy, made = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    shutil.copytree(ROOT / "distopt", copy / "distopt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
    run(*pip, "-w", made, copy, DISTOPT_NO_NATIVE="1")
    (path,) = made.iterdir()
    return path


def test_every_extra_is_tried():
    assert set(IMPORTED) == set(EXTRAS)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.timeout(1800)
def test_nothing_is_broken_beside_an_extra(extra, wheel, linked, tmp_path):
    environment = Environment(tmp_path / "venv", linked)
    pip = [sys.executable, "-m", "pip", "--python", environment.python]
    done = subprocess.run([*pip, "install", "-q", f"{wheel}[{extra}]"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No broken requirements" in environment.pip("check")
    assert "nvidia-" not in environment.pip("list")  # it has not brought a torch of its own
    environment.run(f"import distopt, {IMPORTED[extra]}")
    shutil.rmtree(tmp_path)
