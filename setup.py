"""Builds the native kernels. Everything else about the package is in pyproject.toml.

DISTOPT_NO_NATIVE=1       do not build them: the package then runs on its reference in torch
DISTOPT_REQUIRE_NATIVE=1  fail if they cannot be built, instead of going on without them
MAX_JOBS                  compilers at a time (2)
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/torch_binding.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))


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


class BuildNative(build_ext):
    """Compiles two files at a time, and explains a failure instead of failing."""

    def build_extension(self, ext):
        try:
            self._compile_in_parallel(int(os.environ.get("MAX_JOBS", "2")))
            super().build_extension(ext)
        except Exception as error:
            print(
                f"\ntorch-distopt: THE NATIVE KERNELS WERE NOT BUILT: {error}\n"
                "Install a C++17 compiler (Debian: apt-get install g++) and reinstall to get them."
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
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
