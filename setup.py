"""Builds the native kernels. Everything else about the package is in pyproject.toml.

The CUDA kernels are built where torch has CUDA and its toolkit is found (CUDA_HOME); no GPU is needed for that.

DISTOPT_NO_NATIVE=1       do not build them: the package then runs on its reference in torch
DISTOPT_REQUIRE_NATIVE=1  fail if they cannot be built, instead of going on without them
DISTOPT_REQUIRE_CUDA=1    fail if the CUDA kernels are not built, also for want of a toolkit
DISTOPT_CUDA_ARCHS        GPU generations to build for (80;90), the last also as PTX for later ones
MAX_JOBS                  compilers at a time (2)
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/torch_binding.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
NVCC_OPTIONS = "csrc/cuda/nvcc.options"


def asked(variable):
    return os.environ.get(variable, "0") not in ("", "0")


def extension():
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise SystemExit(
            f"torch-distopt: building the native kernels needs torch >= 2.10 in this environment ({error}).\n"
            "Install torch first (a CPU build will do), then: pip install --no-build-isolation .\n"
            "Or set DISTOPT_NO_NATIVE=1 to install without them."
        ) from None
    return Extension(
        "distopt.ops._native",
        SOURCES,
        depends=HEADERS,
        include_dirs=["csrc", *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030b0000")],
        # No contraction to fused multiply-add: every path must give the bits of the reference.
        extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"],
        language="c++",
        py_limited_api=True,
        optional=not asked("DISTOPT_REQUIRE_NATIVE"),
    )


def cuda_toolkit():
    """The folder of nvcc and its headers, or None. An nvcc on the path may be a script that lives elsewhere."""
    from torch.utils.cpp_extension import CUDA_HOME

    for folder in (CUDA_HOME, "/usr/local/cuda"):
        if folder and all((Path(folder) / part).exists() for part in ("bin/nvcc", "include/cuda_runtime_api.h")):
            return Path(folder)
    return None


def cuda_extension(native):
    """The kernels for CUDA tensors beside those for the CPU, or None where they cannot be built."""
    import torch

    missing, toolkit = None, cuda_toolkit()
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} was built without CUDA"
    elif toolkit is None:
        missing = f"torch has CUDA {torch.version.cuda}, but no toolkit was found: set CUDA_HOME to one of that version"
    if missing is not None:
        if asked("DISTOPT_REQUIRE_CUDA"):
            raise SystemExit(f"torch-distopt: the CUDA kernels were not built: {missing}")
        if torch.version.cuda is not None:
            print(f"torch-distopt: the CUDA kernels are left out: {missing}", file=sys.stderr)
        return None
    return Extension(
        "distopt.ops._native_cuda",
        ["csrc/torch_cuda_binding.cpp"],
        depends=[*HEADERS, *CUDA_SOURCES, *map(str, Path("csrc/cuda").glob("*.cuh")), NVCC_OPTIONS],
        include_dirs=[*native.include_dirs, str(toolkit / "include")],
        library_dirs=[*native.library_dirs, str(toolkit / "lib64"), str(toolkit / "lib")],
        libraries=["torch_cuda", "torch_cpu", "c10", "cudart"],
        define_macros=[*native.define_macros, ("USE_CUDA", None)],
        extra_compile_args=native.extra_compile_args,
        language="c++",
        py_limited_api=True,
        optional=native.optional and not asked("DISTOPT_REQUIRE_CUDA"),
    )


def compile_cuda(target, jobs):
    """Compiles the .cu files to objects in a directory; their paths."""
    archs = os.environ.get("DISTOPT_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    nvcc = [str(cuda_toolkit() / "bin" / "nvcc"), "--options-file", NVCC_OPTIONS, *targets, "-I", "csrc", "-c"]

    def compile_one(source):
        compiled = target / (Path(source).name + ".o")
        command = [*nvcc, source, "-o", str(compiled)]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)
        return str(compiled)

    target.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


class BuildNative(build_ext):
    """Compiles two files at a time, and explains a failure instead of failing."""

    def build_extensions(self):
        self._jobs = int(os.environ.get("MAX_JOBS", "2"))
        self._compile_in_parallel(self._jobs)
        super().build_extensions()

    def build_extension(self, ext):
        kind = "CUDA" if ext.name.endswith("_cuda") else "NATIVE"
        try:
            if kind == "CUDA":
                ext.extra_objects = compile_cuda(Path(self.build_temp) / "cuda", self._jobs)
            super().build_extension(ext)
        except Exception as error:
            needed = (
                "Install the CUDA toolkit of torch's version (CUDA_HOME)"
                if kind == "CUDA"
                else "Install a C++17 compiler (Debian: apt-get install g++)"
            )
            print(
                f"\ntorch-distopt: THE {kind} KERNELS WERE NOT BUILT: {error}\n{needed} and reinstall to get them."
                + (" Going on with the reference in torch, which is slower.\n" if ext.optional else "\n"),
                file=sys.stderr,
            )
            raise

    def _compile_in_parallel(self, jobs):
        compile_one, compile_all = self.compiler._compile, self.compiler.compile

        def compile_sources(*args, **kwargs):
            with ThreadPoolExecutor(jobs) as pool:
                pending = []
                self.compiler._compile = lambda *each: pending.append(pool.submit(compile_one, *each))
                objects = compile_all(*args, **kwargs)
                for job in pending:
                    job.result()
            return objects

        self.compiler.compile = compile_sources


if asked("DISTOPT_NO_NATIVE"):
    print("torch-distopt: DISTOPT_NO_NATIVE is set, the native kernels are left out", file=sys.stderr)
    setup()
else:
    native = extension()
    setup(
        ext_modules=[each for each in (native, cuda_extension(native)) if each is not None],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
