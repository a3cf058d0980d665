"""The source distribution and the wheel: what they hold, what they need of torch, and that they install and work."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import Environment, run
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
USERS_SCRIPT = Path(__file__).with_name("a_users_script.py")
SHIMS = "torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h"
BUILD = ("--no-build-isolation", "--no-deps", "--no-index", "-q")

TRAINS = """
import os, sys, torch, distopt
assert distopt.__file__.startswith(sys.prefix), distopt.__file__
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", rank=0, world_size=1)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1000, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
attached = distopt.DGC(density=0.01, exchange="allgather").attach(model, optimizer)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    torch.manual_seed(1)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(64, 1000)), torch.arange(64) % 10)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
print(attached.stats()["steps"], distopt.ops.build_info().library, distopt.ops.backend())
attached.detach()
torch.distributed.destroy_process_group()
"""

pytestmark = [pytest.mark.job, pytest.mark.timeout(900)]  # builds on a busy machine


def of_the_clone(*folders):
    """Its files there: all but those that git ignores."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT)
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution of a copy of the clone, in which nothing was built."""
    copy, made = (tmp_path_factory.mktemp(name) for name in ("clone", "sdist"))
    for name in of_the_clone():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(made)!r})", cwd=copy)
    (archive,) = made.iterdir()
    return archive


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The source distribution, unpacked."""
    target = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # 3.11.4
    (folder,) = target.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel that the source distribution gives. What was compiled stays there, for whoever builds again."""
    made = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *BUILD, "-w", made, source, DISTOPT_REQUIRE_NATIVE="1")
    (path,) = made.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, linked, tmp_path_factory):
    """An environment with the wheel."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv", linked)
    environment.pip("install", "--no-index", wheel)
    return environment


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    """The native kernels in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("distopt/ops/_native.abi3.so", tmp_path_factory.mktemp("library")))


def test_the_source_distribution_holds_what_a_build_needs_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    needed = of_the_clone("csrc", "distopt") | {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert {name for name in held if ".egg-info/" not in name} == needed | {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert "-cp311-abi3-linux_" in wheel.name  # one for every Python >= 3.11
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in held if name.endswith(".dist-info/METADATA"))
    described = {name for name in held if re.match(r"torch_distopt-[^/]*[.]dist-info/", name)}
    libraries = {"distopt/ops/_native.abi3.so"}
    cuda = "distopt/ops/_native_cuda.abi3.so"
    if (ROOT / cuda).exists():  # torch has CUDA here, and there is its toolkit
        libraries.add(cuda)
    assert held - described == of_the_clone("distopt") | libraries
    assert "distopt/py.typed" in held
    names = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE"}
    assert {name.partition("/")[2] for name in described} == names
    unconditional = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE)
    assert sorted(unconditional) == ["numpy>=1.26", "torch>=2.10"]


def test_with_torch_and_numpy_alone_it_trains_on_its_native_kernels(installed):
    assert "No broken requirements" in installed.pip("check")
    steps, library, backend = installed.run(TRAINS).splitlines()[-1].split()
    assert steps == "30"
    assert library.startswith(str(installed.packages))
    assert backend != "reference"


def test_pip_install_from_the_folder(source, wheel, linked, tmp_path):
    """`wheel` has compiled there already."""
    environment = Environment(tmp_path / "venv", linked)
    environment.pip("install", *BUILD, ".", cwd=source, DISTOPT_REQUIRE_NATIVE="1")
    assert environment.run(TRAINS).split()[-1] != "reference"


def test_without_native_kernels_it_is_pure_python_and_trains_too(sdist, linked, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", *BUILD, "-w", tmp_path, sdist, DISTOPT_NO_NATIVE="1")
    (pure,) = tmp_path.glob("*.whl")
    assert pure.name.endswith("-py3-none-any.whl")
    environment = Environment(tmp_path / "venv", linked)
    environment.pip("install", "--no-index", pure)
    assert environment.run(TRAINS).split()[-1] == "reference"


# -- types ---------------------------------------------------------------------------------------------------------


def test_mypy_checks_a_users_script_against_the_installed_types(installed, tmp_path):
    pytest.importorskip("mypy")
    shutil.copy(USERS_SCRIPT, tmp_path / "right.py")
    (tmp_path / "wrong.py").write_text(
        "import distopt\ndistopt.DGC(density='a tenth')\ndistopt.DGC(dense=1.0)\ndistopt.checkpoint.save(1, 'folder')\n"
    )
    mypy = (sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable", installed.python)
    found = subprocess.run([*mypy, "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    problems = [re.match(r"(\S+): error: .*\[(\S+)\]$", line) for line in found.stdout.splitlines()[:-1]]
    assert [problem and problem.groups() for problem in problems] == [
        ("wrong.py:2", "arg-type"),
        ("wrong.py:3", "call-arg"),
        ("wrong.py:4", "arg-type"),
    ], found.stdout + found.stderr


# -- torch's stable ABI --------------------------------------------------------------------------------------------


def dynamic_symbols(library, *, defined):
    """The names of a library's dynamic symbols with their versions, if they have one."""
    lines = run("readelf", "--wide", "--dyn-syms", library).splitlines()
    rows = [row for line in lines if len(row := line.split()) >= 8 and row[0][:-1].isdigit()]
    return {row[7] for row in rows if (row[6] != "UND") == defined}


def shims(symbols):
    return {symbol for symbol in symbols if re.match(r"(aoti_)?torch_", symbol)}


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """The functions of the stable ABI of torch 2.10, which is the target that setup.py gives."""
    (target,) = re.findall(r'"TORCH_TARGET_VERSION", "(\w+)"', (ROOT / "setup.py").read_text())
    assert target.startswith("0x020a")
    header = tmp_path_factory.mktemp("header") / "shims.cpp"
    header.write_text("".join(f"#include <{shim}>\n" for shim in SHIMS))
    paths = [f"-I{path}" for path in cpp_extension.include_paths()]
    text = run("g++", "-E", "-std=c++17", f"-DTORCH_TARGET_VERSION={target}", *paths, header)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def test_the_kernels_need_only_the_stable_shims_of_the_oldest_torch(library, declared):
    needed = dynamic_symbols(library, defined=False)
    assert len(shims(needed)) > 20
    assert shims(needed) <= declared
    system = r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_.*|_ZN?K?St\w+|__gmon_start__|_ITM_(de)?registerTMCloneTable"
    assert [name for name in needed - shims(needed) if not re.fullmatch(system, name)] == []


@pytest.mark.slow
def test_torch_2_10_has_every_shim(library, tmp_path):
    """The wheel of that release for aarch64 is a CPU build of 146 MB; the functions have the same names on x86-64."""
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.11")
    platform = "--platform=manylinux_2_28_aarch64"
    done = subprocess.run(
        [*pip, platform, "-d", tmp_path, "torch==2.10.0"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"torch 2.10.0 cannot be downloaded: {done.stderr[-500:]}")
    (release,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(release) as archive:
        theirs = archive.extract("torch/lib/libtorch_cpu.so", tmp_path)
    assert shims(dynamic_symbols(library, defined=False)) <= dynamic_symbols(theirs, defined=True)
