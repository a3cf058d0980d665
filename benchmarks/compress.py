"""What selecting and masking cost beside the update they follow: the kernel, the floor, torch.topk and sampling.

    OMP_NUM_THREADS=1 python benchmarks/compress.py --json benchmarks/results/compress-NAME.json

One run, one thread. The contenders take turns in each round, so that a disturbance hits all of them; each is divided
by the floor of its own round: `u.mul_(m).add_(g); v.add_(u)`, which any momentum correction in torch has to do.

- kernel: `distopt.ops.dgc_sparsify_`, exact;
- topk: the floor, then torch.topk(v.abs(), k) and masking of u and v, exact;
- sampling: the floor, then the scheme of the authors of DGC (Lin et al., ICLR 2018): a threshold from
  strided samples, refined until 0.8 k to 1.3 k pass, masking by the mask; not exact.
"""

import argparse
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distopt import ops
from distopt.cli.machine import machine, versions

SIZES = (262_144, 2_359_296, 25_557_032)  # 512x512, a 3x3 convolution of 512 channels, all of ResNet-50
DENSITIES = (0.001, 0.01, 0.25)  # 25% is the first stage of the warm-up
MOMENTUM = 0.9


def floor(g: Tensor, u: Tensor, v: Tensor, k: int) -> None:
    u.mul_(MOMENTUM).add_(g)
    v.add_(u)


def kernel(g: Tensor, u: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return ops.dgc_sparsify_(g, u, v, k, momentum=MOMENTUM)


def topk(g: Tensor, u: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    floor(g, u, v, k)
    indices = torch.topk(v.abs(), k, sorted=False).indices
    return take_out(u, v, indices)


def sampling(g: Tensor, u: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    floor(g, u, v, k)
    magnitude = v.abs()
    threshold = sampled_threshold(magnitude, k)
    mask = magnitude >= threshold
    for _ in range(10):
        selected = int(mask.sum())
        if selected > 1.3 * k:  # too many: select again among those that passed
            passed = mask.nonzero().view(-1)
            indices = passed[torch.topk(magnitude[passed], k, sorted=False).indices]
            return take_out(u, v, indices)
        if selected >= 0.8 * k:
            break
        threshold = threshold * 0.8
        mask = magnitude >= threshold
    return take_out(u, v, mask.nonzero().view(-1)[:k])


def sampled_threshold(magnitude: Tensor, k: int) -> Tensor:
    numel, density = magnitude.numel(), k / magnitude.numel()
    samples = max(numel // 100, math.ceil(2 / density))
    stride = max(1, numel // samples)
    sample = magnitude[random.randrange(stride) :: stride]
    return torch.topk(sample, max(1, math.ceil(sample.numel() * density))).values.min()


def take_out(u: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    values = v[indices]
    u[indices] = 0
    v[indices] = 0
    return values, indices.int()


CONTENDERS: dict[str, Callable[..., object]] = {"kernel": kernel, "floor": floor, "topk": topk, "sampling": sampling}


def measure(numel: int, density: float, repeats: int) -> dict[str, object]:
    """Milliseconds per contender and round, each on states of its own."""
    k = max(1, math.ceil(numel * density))
    generator = torch.Generator().manual_seed(0)
    states = {name: [torch.zeros(numel), torch.zeros(numel)] for name in CONTENDERS}
    gradients = [torch.randn(numel, generator=generator) for _ in range(2)]
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for i in range(repeats + 2):
        for name, contender in CONTENDERS.items():
            start = time.perf_counter()
            contender(gradients[i % 2], *states[name], k)
            times[name].append((time.perf_counter() - start) * 1e3)
    times = {name: each[2:] for name, each in times.items()}  # the first two rounds touch fresh memory
    ratios = {name: [t / f for t, f in zip(each, times["floor"], strict=True)] for name, each in times.items()}
    return {
        "numel": numel,
        "density": density,
        "k": k,
        "ms": {name: summary(each) for name, each in times.items()},
        "ratio_to_floor": {name: summary(each) for name, each in ratios.items()},
    }


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def commit() -> str:
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def show(result: dict) -> None:
    for name in CONTENDERS:
        ms, ratio = result["ms"][name], result["ratio_to_floor"][name]
        print(
            f"{result['numel']:>12,} {result['density']:>8} {name:>9} {ms['median']:>10.3f} "
            f"[{ms['quartile_1']:.3f}, {ms['quartile_3']:.3f}]".ljust(66)
            + f"{ratio['median']:>8.2f} [{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}]",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: see benchmarks/compress_cuda.py"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at the largest size, ten times as many below")
    parser.add_argument("--note", default="", help="kept in the JSON, for what the numbers cannot say")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2 to give a spread, got {args.repeats}; the default is 15")
    torch.set_num_threads(1)
    random.seed(0)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine() | {"load_at_start": os.getloadavg()[0]},
        "versions": versions(),
        "commit": commit(),
        "threads": 1,
        "repeats": args.repeats,
        "note": args.note,
        "results": [],
    }
    if args.device == "cuda":
        import compress_cuda

        compress_cuda.run(args, report, CONTENDERS)
        return
    print(f"{report['machine']['cpu']}, {ops.backend()}, one thread; medians [quartiles]")
    print(f"{'elements':>12} {'density':>8} {'':>9} {'ms':>10}".ljust(66) + f"{'x floor':>8}")
    for numel in SIZES:
        for density in DENSITIES:
            repeats = args.repeats if numel == SIZES[-1] else 10 * args.repeats
            report["results"].append(measure(numel, density, repeats))
            show(report["results"][-1])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
