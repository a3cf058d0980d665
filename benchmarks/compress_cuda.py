"""Selection on a GPU beside a copy of as many bytes: the kernel, the floor, torch.topk and sampling.

    python benchmarks/compress.py --device cuda --json benchmarks/results/compress-NAME.json

Momentum, velocity, selection and masking read g, u, v and write u, v: 20 bytes per element in fp32. `copy` moves 20
bytes per element from device memory to device memory (10 read, 10 written), so its time over the kernel's is the part
of the copy bandwidth that the kernel reaches.

- device ms: between two CUDA events, with the host ahead (a wait is queued in front), so that launches are not in it;
- host ms: from the call to the end of the device's work, launches and waiting included.

The contenders take turns in each round, each on states of its own. `equal` gives the kernel gradients that are all one
value: every entry ties, candidates cannot help, and all elements are looked at.
"""

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distopt import ops

SIZES = (25_557_032, 102_760_448)  # all of ResNet-50; the largest layer of VGG-16
DENSITIES = (0.001, 0.01, 0.25)  # 25% is the first stage of the warm-up
MOMENTUM = 0.9
BYTES_PER_ELEMENT = 20
NUM_OWNERS = 8
WARM_UP = 3
PROFILED = ("kernel", "segments", "interleaved")


def resnet50_rows(numel: int) -> list[tuple[int, int]]:
    """(start, numel) of the tensors of more than one dimension in ResNet-50, in order, with what lies between."""
    rows, at = [], 0

    def add(weight: int, beside: int) -> None:
        nonlocal at
        rows.append((at, weight))
        at += weight + beside

    add(64 * 3 * 49, 2 * 64)
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            add(width * planes, 2 * planes)
            add(planes * planes * 9, 2 * planes)
            add(planes * planes * 4, 8 * planes)
            if block == 0:
                add(width * planes * 4, 8 * planes)
            width = planes * 4
    add(2048 * 1000, 1000)
    assert at == numel, f"ResNet-50 has {numel} parameters, the table says {at}"
    return rows


class Workload:
    """Inputs of one size and density, and the states of each contender."""

    def __init__(self, numel: int, density: float, contenders: dict[str, Callable[..., object]], values: str) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.numel = numel
        self.k = max(1, math.ceil(numel * density))
        if values == "equal":
            self.gradients = [torch.full((numel,), 0.5, device="cuda") for _ in range(2)]
        else:
            self.gradients = [torch.randn(numel, generator=generator, device="cuda") for _ in range(2)]
        self.states = {name: [torch.zeros(numel, device="cuda") for _ in range(2)] for name in contenders}
        self.contenders = contenders

    def call(self, name: str, i: int) -> object:
        return self.contenders[name](self.gradients[i % 2], *self.states[name], self.k)


def copy(numel: int) -> Callable[..., None]:
    """Moves 20 bytes per element; the arguments of the other contenders are ignored."""
    source = torch.empty(numel * BYTES_PER_ELEMENT // 2, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)

    def move(*_: object) -> None:
        target.copy_(source)

    return move


def segments_kernel(numel: int, density: float) -> Callable[..., object]:
    """All compressed tensors of ResNet-50 in one call."""
    rows = [(start, n, max(1, math.ceil(n * density))) for start, n in resnet50_rows(numel)]
    table = torch.tensor(rows, dtype=torch.int64, device="cuda")
    state_numel, count = sum(n for _, n, _ in rows), sum(k for _, _, k in rows)

    def kernel(g: Tensor, u: Tensor, v: Tensor, k: int) -> object:
        return ops.dgc_sparsify_segments_(g, u[:state_numel], v[:state_numel], table, count, momentum=MOMENTUM)

    return kernel


def device_ms(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about a millisecond: the launches are queued when the clock starts
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_ms(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def check_exact(g: Tensor, k: int) -> None:
    """Nothing that was left is larger than anything that was taken, and the rest is untouched."""
    u, v = torch.zeros_like(g), torch.zeros_like(g)
    values, indices = ops.dgc_sparsify_(g, u, v, k, momentum=MOMENTUM)
    left = g.clone()
    left[indices.long()] = 0
    ok = torch.equal(values, g[indices.long()]) and torch.equal(v, left) and bool((indices.diff() > 0).all())
    if not ok or float(v.abs().max()) > float(values.abs().min()):
        raise SystemExit("the kernel's selection is wrong: run `make gpu` first, whose tests say where")


def profile(workload: Workload, name: str, repeats: int = 10) -> dict[str, float]:
    """Microseconds per call in each of this package's device kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for i in range(repeats):
            workload.call(name, i)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in recorded.key_averages():
        name_of_kernel = re.search(r"(\w+_kernel)\b", event.key) if "distopt::cuda" in event.key else None
        if name_of_kernel is not None:
            kernel = name_of_kernel.group(1)
            times[kernel] = times.get(kernel, 0.0) + event.device_time_total / repeats
    return {kernel: round(us, 2) for kernel, us in sorted(times.items(), key=lambda item: -item[1])}


def measure(
    numel: int, density: float, repeats: int, torch_contenders: dict[str, Callable[..., object]], values: str
) -> dict[str, object]:
    contenders = dict(torch_contenders)
    if values == "normal":
        contenders["copy"] = copy(numel)
        if numel == SIZES[0]:
            contenders["segments"] = segments_kernel(numel, density)
        contenders["interleaved"] = lambda g, u, v, k: ops.topk_abs_interleaved(g, max(1, k // NUM_OWNERS), NUM_OWNERS)
    else:
        contenders = {"kernel": contenders["kernel"], "copy": copy(numel)}
    workload = Workload(numel, density, contenders, values)
    check_exact(workload.gradients[0], workload.k)
    clocks = {"device_ms": device_ms, "host_ms": host_ms}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in contenders} for clock in clocks}
    for i in range(repeats + WARM_UP):
        for clock, timer in clocks.items():
            for name in contenders:
                times[clock][name].append(timer(lambda name=name, i=i: workload.call(name, i)))
    kept = {clock: {name: each[WARM_UP:] for name, each in named.items()} for clock, named in times.items()}
    on_device = kept["device_ms"]
    pairs = {name: list(zip(each, on_device["copy"], strict=True)) for name, each in on_device.items()}
    result = {
        "numel": numel,
        "density": density,
        "k": workload.k,
        "values": values,
        **{clock: {name: summary(each) for name, each in named.items()} for clock, named in kept.items()},
        "part_of_copy_bandwidth": {name: summary([c / t for t, c in each]) for name, each in pairs.items()},
        "copy_bytes_per_s": round(numel * BYTES_PER_ELEMENT / statistics.median(on_device["copy"]) * 1e3),
        "profile_us": {name: profile(workload, name) for name in PROFILED if name in contenders},
    }
    if "topk" in on_device:
        ratios = [t / k for t, k in zip(on_device["topk"], on_device["kernel"], strict=True)]
        result["times_faster_than_topk"] = summary(ratios)
    return result


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def show(result: dict) -> None:
    for name, ms in result["device_ms"].items():
        part = result["part_of_copy_bandwidth"][name]["median"]
        label = name if result["values"] == "normal" else f"{name} ({result['values']})"
        print(
            f"{result['numel']:>12,} {result['density']:>8} {label:>15} {ms['median']:>10.4f} "
            f"[{ms['quartile_1']:.4f}, {ms['quartile_3']:.4f}] {result['host_ms'][name]['median']:>10.4f} {part:>8.2f}",
            flush=True,
        )
    for name, kernels in result["profile_us"].items():
        print(f"{'':>21} {name}: " + ", ".join(f"{kernel} {us}" for kernel, us in kernels.items()) + " us")


def device_facts() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def run(
    args: argparse.Namespace, report: dict[str, object], torch_contenders: dict[str, Callable[..., object]]
) -> None:
    """Measures, prints, and adds to the report of benchmarks/compress.py, which is written where args.json says."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device and a torch with CUDA, got none; leave the option out")
    if ops.build_info().cuda_library is None:
        raise SystemExit(f"--device cuda measures the CUDA kernels: {ops.build_info().cuda_problem}; run `make gpu`")
    results: list[dict[str, object]] = []
    report |= {"device": device_facts(), "results": results}
    print(f"{report['device']['gpu']}; medians [quartiles]")
    print(f"{'elements':>12} {'density':>8} {'':>15} {'device ms':>10} {'':>18} {'host ms':>10} {'of copy':>8}")
    for numel in SIZES:
        for density in DENSITIES:
            for values in ("normal", "equal") if density == DENSITIES[0] else ("normal",):
                results.append(measure(numel, density, args.repeats, torch_contenders, values))
                show(results[-1])
                torch.cuda.empty_cache()
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
