"""What selecting and masking cost beside the update they follow: the kernel, the floor, torch.topk and sampling.

    OMP_NUM_THREADS=1 python benchmarks/compress.py --json benchmarks/results/compress-NAME.json

One run, one thread. The contenders take turns in each round, so that a disturbance hits all of them; each is divided
by the floor of its own round: `u.mul_(m).add_(g); v.add_(u)`, which any momentum correction in torch has to do.

- kernel: `distopt.ops.dgc_sparsify_`, exact;
- topk: the floor, then torch.topk(v.abs(), k) and masking of u and v, exact;
- sampling: the floor, then the scheme of the authors of DGC (Lin et al., ICLR 2018): a threshold from
  strided samples, refined until 0.8 k to 1.3 k pass, masking by the mask; not exact.

Then, taking turns in the same way: the kernel with one and with two threads; 1,000 tensors of 1,000 entries in one call
beside one tensor of as many; the k largest of each of 8 owners in one call beside as many largest of all; a bucket
checked, selected from and cleared in one call (`ops.dgc_take_segments_`, `ops.ef_take_segments_`), beside the three
calls and the selection alone. Last, the kernel's selection is compared to `distopt.ops.reference` at the largest size,
and what the kernels counted is kept.
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
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from distopt import ops
from distopt.cli.machine import machine, versions
from distopt.ops import reference

SIZES = (262_144, 2_359_296, 25_557_032)  # 512x512, a 3x3 convolution of 512 channels, all of ResNet-50
DENSITIES = (0.001, 0.01, 0.25)  # 25% is the first stage of the warm-up
MOMENTUM = 0.9
STATES = {"dgc": ("u", "v"), "ef": ("residual",)}


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


def take_turns(
    contenders: dict[str, Callable[[int], object]],
    base: str,
    repeats: int,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, object]:
    """Milliseconds per contender and round, and each round's ratio to the base; contenders get the round's number.

    `prepare` runs before each, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats + 2):
        for name, contender in contenders.items():
            prepare()
            start = time.perf_counter()
            contender(i)
            times[name].append((time.perf_counter() - start) * 1e3)
    times = {name: each[2:] for name, each in times.items()}  # the first two rounds touch fresh memory
    ratios = {name: [t / f for t, f in zip(each, times[base], strict=True)] for name, each in times.items()}
    return {
        "ms": {name: summary(each) for name, each in times.items()},
        f"ratio_to_{base}": {name: summary(each) for name, each in ratios.items()},
    }


def measure(numel: int, density: float, repeats: int) -> dict[str, object]:
    """All contenders, each on states of its own."""
    k = max(1, math.ceil(numel * density))
    generator = torch.Generator().manual_seed(0)
    states = {name: [torch.zeros(numel), torch.zeros(numel)] for name in CONTENDERS}
    gradients = [torch.randn(numel, generator=generator) for _ in range(2)]

    def turn(name: str) -> Callable[[int], object]:
        return lambda i: CONTENDERS[name](gradients[i % 2], *states[name], k)

    turns = take_turns({name: turn(name) for name in CONTENDERS}, "floor", repeats)
    return {"numel": numel, "density": density, "k": k} | turns


def measure_threads(numel: int, density: float, repeats: int) -> dict[str, object]:
    """The kernel with one and with two threads, each on states of its own."""
    k = max(1, math.ceil(numel * density))
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    states = [[torch.zeros(numel), torch.zeros(numel)] for _ in range(2)]

    def turn(num_threads: int) -> Callable[[int], object]:
        def run(_: int) -> None:
            torch.set_num_threads(num_threads)
            kernel(gradient, *states[num_threads - 1], k)

        return run

    turns = take_turns({"one_thread": turn(1), "two_threads": turn(2)}, "one_thread", repeats)
    torch.set_num_threads(1)
    return {"numel": numel, "density": density, "k": k} | turns


def measure_small(num_tensors: int, numel: int, density: float, repeats: int) -> dict[str, object]:
    """Many small tensors in one call, in a call each, and one tensor of as many entries."""
    k = math.ceil(numel * density)
    total = num_tensors * numel
    gradient = torch.randn(total, generator=torch.Generator().manual_seed(0))
    states = [[torch.zeros(total), torch.zeros(total)] for _ in range(3)]
    segments = torch.tensor([(i * numel, numel, k) for i in range(num_tensors)])
    parts = list(zip(*(t.split(numel) for t in (gradient, *states[1])), strict=True))

    def in_one_call(_: int) -> None:
        ops.dgc_sparsify_segments_(gradient, *states[0], segments, num_tensors * k, momentum=MOMENTUM)

    def in_a_call_each(_: int) -> None:
        for part in parts:
            kernel(*part, k)

    def one_tensor(_: int) -> None:
        kernel(gradient, *states[2], num_tensors * k)

    contenders = {"one_call": in_one_call, "a_call_each": in_a_call_each, "one_tensor": one_tensor}
    turns = take_turns(contenders, "one_tensor", repeats)
    return {"num_tensors": num_tensors, "numel_each": numel, "k_each": k} | turns


def measure_owners(numel: int, density: float, num_owners: int, repeats: int) -> dict[str, object]:
    """The largest of each owner in one call, as many largest of all, and what torch needs for the former."""
    k = math.ceil(numel * density / num_owners)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))

    def by_torch(_: int) -> None:
        for owner in range(num_owners):
            torch.topk(x[owner::num_owners].abs(), k, sorted=False)

    contenders = {
        "interleaved": lambda _: ops.topk_abs_interleaved(x, k, num_owners),
        "topk_abs": lambda _: ops.topk_abs(x, k * num_owners),
        "torch": by_torch,
    }
    turns = take_turns(contenders, "topk_abs", repeats)
    return {"numel": numel, "num_owners": num_owners, "k_each": k} | turns


def measure_taking(op: str, numel: int, density: float, repeats: int) -> dict[str, object]:
    """A bucket to the update it becomes: check, selection and zeros in one call, in three, and the selection alone."""
    k = math.ceil(numel * density)
    source = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    bucket, segments = source.clone(), torch.tensor([(0, numel, k)])
    states = {name: [torch.zeros(numel) for _ in STATES[op]] for name in ("one_call", "three_calls", "sparsify")}
    options = {"momentum": MOMENTUM} if op == "dgc" else {}
    sparsify, take = getattr(ops, f"{op}_sparsify_segments_"), getattr(ops, f"{op}_take_segments_")

    def in_three_calls(_: int) -> None:
        ops.all_finite(bucket)
        sparsify(bucket, *states["three_calls"], segments, k, **options)
        bucket.zero_()

    contenders = {
        "one_call": lambda _: take(bucket, *states["one_call"], segments, k, **options),
        "three_calls": in_three_calls,
        "sparsify": lambda _: sparsify(bucket, *states["sparsify"], segments, k, **options),
    }
    turns = take_turns(contenders, "sparsify", repeats, lambda: bucket.copy_(source))
    return {"op": op, "numel": numel, "density": density, "k": k} | turns


EXACT = {  # at the largest size, where a reference by sorting takes seconds
    "normal": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "student-t(3)": torch.distributions.StudentT(3.0),
}


def check_exact(numel: int, densities: tuple[float, ...]) -> list[dict[str, object]]:
    """Whether the kernel, alone and with two threads, takes out what the reference says."""
    found = []
    for seed, (name, distribution) in enumerate(EXACT.items()):
        torch.manual_seed(seed)
        x = distribution.sample((numel,))
        torch.set_num_threads(2)
        for density in densities:
            k = math.ceil(numel * density)
            values, indices = reference.topk_abs(x, k)
            for num_threads in (1, 2):
                torch.set_num_threads(num_threads)
                u, v = torch.zeros(numel), torch.zeros(numel)
                got_values, got_indices = kernel(x, u, v, k)
                equal = torch.equal(got_values, values) and torch.equal(got_indices, indices)
                v[indices.long()] = values
                equal = equal and torch.equal(v, x)
                found.append(
                    {"input": name, "seed": seed, "numel": numel, "k": k, "threads": num_threads, "equal": equal}
                )
    torch.set_num_threads(1)
    return found


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def commit() -> str:
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def show(result: dict, base: str = "floor", label: str = "") -> None:
    label = label or f"{result['numel']:>12,} {result['density']:>8}"
    for name, ms in result["ms"].items():
        ratio = result[f"ratio_to_{base}"][name]
        print(
            f"{label:>21} {name:>11} {ms['median']:>10.3f} [{ms['quartile_1']:.3f}, {ms['quartile_3']:.3f}]".ljust(68)
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
    print(f"{'elements':>12} {'density':>8} {'':>11} {'ms':>10}".ljust(68) + f"{'x floor':>8}")
    for numel in SIZES:
        for density in DENSITIES:
            repeats = args.repeats if numel == SIZES[-1] else 10 * args.repeats
            report["results"].append(measure(numel, density, repeats))
            show(report["results"][-1])
    print("one and two threads: ratio to one")
    report["two_threads"] = []
    for numel in SIZES:
        for density in DENSITIES:
            repeats = args.repeats if numel == SIZES[-1] else 10 * args.repeats
            report["two_threads"].append(measure_threads(numel, density, repeats))
            show(report["two_threads"][-1], "one_thread")
    print("small tensors: ratio to one tensor of as many entries")
    report["small_tensors"] = measure_small(1_000, 1_000, 0.001, 10 * args.repeats)
    show(report["small_tensors"], "one_tensor", "1,000 x 1,000")
    print("largest of each of 8 owners: ratio to as many largest of all")
    report["owners"] = measure_owners(SIZES[-1], 0.001, 8, args.repeats)
    show(report["owners"], "topk_abs", f"{SIZES[-1]:,} by 8")
    print("check, selection and zeros: ratio to the selection alone")
    report["taking"] = []
    for op in STATES:
        for numel in (10_000_000, SIZES[-1]):
            report["taking"].append(measure_taking(op, numel, 0.001, args.repeats))
            show(report["taking"][-1], "sparsify", f"{op} {numel:,}")
    report["selection_counts"] = asdict(ops.selection_counts())
    print(f"counted: {ops.selection_counts()}")
    report["exact"] = check_exact(SIZES[-1], DENSITIES[:2])
    equal = sum(each["equal"] for each in report["exact"])
    print(f"equal to the reference at {SIZES[-1]:,}: {equal} of {len(report['exact'])}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if equal != len(report["exact"]):
        sys.exit("the kernel did not select what the reference does")


if __name__ == "__main__":
    main()
