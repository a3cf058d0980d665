"""The package installs with and without a compiler, says which it was, and can be told what to run on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distopt import ops

ROOT = Path(__file__).parents[2]
TELL = "from distopt import ops; import torch; ops.topk_abs(torch.ones(3), 1); ops.all_finite(torch.ones(3)); "


def run(*command, cwd=None, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100, check=False)


def tell(warm_python, code="print(ops.backend())", path=ROOT, **environment):
    return warm_python.run(TELL + code, cwd="/", path=path, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a source distribution holds, without anything built."""
    target = tmp_path_factory.mktemp("source")
    for name in ("csrc", "distopt"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def install(source, target, *options, **environment):
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v")
    return run(*pip, *options, "--target", str(target), str(source), **environment)


@pytest.mark.parametrize("path", ops.build_info().available)
def test_the_variable_forces_a_path(warm_python, path):
    done = tell(warm_python, DISTOPT_CPU_CAPABILITY=path)
    assert done.stdout.strip() == path, done.stderr
    assert "reference" not in done.stderr  # asked for: nothing to warn about


def test_an_unknown_path_is_an_error(warm_python):
    done = tell(warm_python, DISTOPT_CPU_CAPABILITY="sse9")
    message = "ConfigError: DISTOPT_CPU_CAPABILITY must be one of scalar, avx2, avx512, neon, reference, got 'sse9'"
    assert message in done.stderr


@pytest.mark.job
def test_without_a_compiler_it_installs_and_says_so_once(warm_python, source, tmp_path):
    done = install(source, tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "THE NATIVE KERNELS WERE NOT BUILT" in done.stdout + done.stderr
    told = tell(warm_python, "print(ops.build_info(), ops.__file__)", path=tmp_path)
    assert "backend='reference'" in told.stdout, told.stderr
    assert str(tmp_path) in told.stdout
    assert told.stderr.count("distopt runs on its reference") == 1
    assert "the native kernels were not built; install a C++17 compiler" in told.stderr
    forced = tell(warm_python, path=tmp_path, DISTOPT_CPU_CAPABILITY="avx2")
    assert "DISTOPT_CPU_CAPABILITY=avx2 is not available here: the native kernels were not built" in forced.stderr


@pytest.mark.job
def test_a_required_build_fails_loudly(source, tmp_path):
    build = (sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    broken = {"CC": "/nonexistent", "CXX": "/nonexistent"}
    done = run(*build, cwd=source, DISTOPT_REQUIRE_NATIVE="1", **broken)
    assert done.returncode != 0
    assert "THE NATIVE KERNELS WERE NOT BUILT" in done.stderr


def test_the_build_says_that_torch_is_missing(source, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    done = run(sys.executable, "setup.py", "--version", cwd=source, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "needs torch >= 2.10" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr
    skipped = run(sys.executable, "setup.py", "--version", cwd=source, PYTHONPATH=str(tmp_path), DISTOPT_NO_NATIVE="1")
    assert skipped.returncode == 0, skipped.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_required_cuda_kernels_need_a_torch_with_cuda(source):
    done = run(sys.executable, "setup.py", "--version", cwd=source, DISTOPT_REQUIRE_CUDA="1")
    assert done.returncode != 0
    assert f"the CUDA kernels were not built: torch {torch.__version__} was built without CUDA" in done.stderr
    info = ops.build_info()
    assert (info.cuda_library, info.cuda_problem) == (None, "this torch was built without CUDA")
