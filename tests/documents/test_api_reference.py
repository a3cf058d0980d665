"""Sphinx builds the API reference from the docstrings without a warning, and all public names are in it."""

import importlib
import re
import subprocess
import sys

import pytest
from document_blocks import ROOT

import distopt

SOURCE = ROOT / "docs" / "api"
WITH_NAMES = ("ddp", "coding", "gossip", "federated", "local", "batch", "job", "ops", "compress", "comm", "observe")
WITHOUT_LIST = ("checkpoint", "config", "errors", "gradients")
ADAPTER = re.compile(r"^(__all__ = |def (attach|initialize)\(|class DistoptCallback\b)", re.MULTILINE)


def adapters():
    """The modules of `distopt.integrations` that users name; what they share defines none of these."""
    folder = ROOT / "distopt" / "integrations"
    files = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    found = [path for path in files if path.parent != folder or path.stem != "__init__"]
    return sorted(
        path.parent.name if path.stem == "__init__" else path.stem for path in found if ADAPTER.search(path.read_text())
    )


pytestmark = pytest.mark.timeout(900)  # Sphinx on a busy machine


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The inventory: what is described where."""
    pytest.importorskip("sphinx")
    from sphinx.util.inventory import InventoryFile

    folder = tmp_path_factory.mktemp("reference")
    # a process of its own: what stands for the hosts must not stay in this one
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-E", "-b", "html", SOURCE, folder]
    done = subprocess.run(sphinx, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    found = InventoryFile.loads((folder / "objects.inv").read_bytes(), uri="").data
    return {name for kind, names in found.items() if kind.startswith("py:") for name in names}


def described(name, subject, inventory):
    """Under the name, where it is defined, or in a package around that module."""
    module, own = str(getattr(subject, "__module__", "")).split("."), getattr(subject, "__qualname__", None)
    return {name, *(f"{'.'.join(module[:n])}.{own}" for n in range(2, len(module) + 1))} & inventory


@pytest.mark.job
def test_every_public_name_is_described(built):
    missing = []
    for part in ("", *WITH_NAMES):
        module = importlib.import_module(f"distopt.{part}".strip("."))
        for name in module.__all__:
            subject = getattr(module, name)
            if not described(f"{module.__name__}.{name}", subject, built) and name != "__version__":
                missing.append(f"{module.__name__}.{name}")
    assert not missing, missing


@pytest.mark.job
def test_parts_and_adapters_have_a_page(built):
    assert {f"distopt.{name}" for name in (*WITH_NAMES, *WITHOUT_LIST)} <= built
    for name in distopt.__all__:
        if name.islower() and not name.startswith("_") and type(getattr(distopt, name)) is type(distopt):
            assert f"distopt.{name}" in built
    assert {f"distopt.integrations.{name}" for name in adapters()} <= built


def test_every_adapter_is_on_the_page_of_the_hosts():
    shown = re.findall(
        r"^\.\. automodule:: distopt\.integrations\.(\w+)$", (SOURCE / "integrations.rst").read_text(), re.MULTILINE
    )
    assert sorted(shown) == adapters()
