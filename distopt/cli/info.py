"""`distopt info`: what is built and what is found on this machine. Imports none of the hosts it looks for."""

import shutil
from typing import Any

import torch
import torch.distributed as dist

from distopt import ops
from distopt.cli.machine import installed_version, versions

HOSTS = ("deepspeed", "accelerate", "lightning", "flwr")


def collect() -> dict[str, Any]:
    """Everything that `distopt info` reports, as plain values for JSON; None means not found."""
    return {
        **versions(),
        "native_kernels": ops.backend() != "reference",
        "cuda_kernels": ops.build_info().cuda_library is not None,
        "cuda_kernels_problem": ops.build_info().cuda_problem,
        "cuda_build": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "distributed": {
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": dist.is_available() and dist.is_nccl_available(),
            "mpi": dist.is_available() and dist.is_mpi_available(),
        },
        "mpi4py": installed_version("mpi4py"),
        "mpirun": shutil.which("mpirun"),
        "hosts": {name: installed_version(name) for name in HOSTS},
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (name, value) lines for a person."""
    native = f"built, CPU path {found['kernels']}"
    reference = "not built: the pure-torch reference does the work (correct, slower)"
    cuda_kernels = "built" if found["cuda_kernels"] else f"none: {found['cuda_kernels_problem'] or 'not asked for'}"
    return [
        ("distopt", found["distopt"]),
        ("Python", found["python"]),
        ("torch", found["torch"]),
        ("native kernels", native if found["native_kernels"] else reference),
        ("CUDA", f"torch built for {found['cuda_build']}" if found["cuda_build"] else "torch built without"),
        ("CUDA kernels", cuda_kernels),
        ("CUDA devices", ", ".join(found["cuda_devices"]) or "none"),
        ("backends", ", ".join(name for name, there in found["distributed"].items() if there) or "none"),
        ("MPI", f"mpi4py {found['mpi4py'] or 'not installed'}, mpirun {found['mpirun'] or 'not found'}"),
        *((name, version or "not installed") for name, version in found["hosts"].items()),
    ]
