"""What decoding costs the master with many workers and a large model: the coefficients, and the sum of the messages.

    OMP_NUM_THREADS=1 python benchmarks/decode.py --json benchmarks/results/decode-NAME.json

- coefficients: `Code.decode` of n = 256 workers, s = 27 of them missing, at random and adjacent; beside it least
  squares over all survivors, which is what the null space of the matrix saves, and `Code.decodable`, which the master
  asks after each arrival. How truly the parts are counted, `||a||` and the relative error of a decoded gradient with
  float32 messages come with it.
- combination: `combine` of 25 million parameters. Its floor is reading every message once (`Tensor.sum`) in the same
  round. The messages of 229 workers would be 23 GB; here each is a window into one buffer, 8 million elements after the
  one before, so that what is read again has long left the caches. `with_write` adds to the floor one pass that writes
  the sum.
- fingerprint: what `disagreement` wants to know of a message, beside reading it.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from compress import commit, show, summary, take_turns
from distopt.cli.machine import machine, versions
from distopt.coding import Code, binary, combine, cyclic, cyclic_mds, expander, fingerprint, heterogeneous
from distopt.errors import DecodeError

NUM_WORKERS, STRAGGLERS = 256, 27
NUMEL = 25_000_000
SHIFT = 8_000_000  # elements between the windows of two messages


def codes() -> dict[str, Callable[[], Code]]:
    n, s = NUM_WORKERS, STRAGGLERS
    speeds = np.random.default_rng(0).lognormal(0.0, 0.3, n).tolist()
    return {
        "binary": lambda: binary(n, s),
        "cyclic": lambda: cyclic(n, s),
        "cyclic_mds": lambda: cyclic_mds(n, s),
        "heterogeneous": lambda: heterogeneous(speeds, s),
        "expander": lambda: expander(n, s + 1),
    }


def missing_sets(repeats: int) -> dict[str, list[list[int]]]:
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(NUM_WORKERS)[:STRAGGLERS].tolist() for _ in range(repeats)]
    adjacent = [[(first + i) % NUM_WORKERS for i in range(STRAGGLERS)] for first in range(0, repeats)]
    return {"random": drawn, "adjacent": adjacent}


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def by_least_squares(code: Code, survivors: list[int]) -> np.ndarray:
    return np.linalg.lstsq(code.matrix[survivors].T, np.ones(code.num_parts), rcond=None)[0]


def relative_error(code: Code, a: np.ndarray) -> float:
    """Of the decoded gradient, when each message is rounded to float32 once."""
    gradients = np.random.default_rng(1).standard_normal((code.num_parts, 200))
    exact = gradients.sum(0)
    messages = (code.matrix @ gradients).astype(np.float32).astype(np.float64)
    return float(np.linalg.norm(a @ messages - exact) / np.linalg.norm(exact))


def measure_coefficients(name: str, make: Callable[[], Code], pattern: str, sets: list[list[int]]) -> dict:
    construct_ms = milliseconds(make)
    code = make()
    times: dict[str, list[float]] = {"decode": [], "decodable": [], "least_squares": []}
    wrong, amplified, errors, refused = [], [], [], 0
    for missing in sets:
        survivors = sorted(set(range(NUM_WORKERS)) - set(missing))
        try:
            a = code.decode(survivors)
        except DecodeError:
            refused += 1
        else:
            wrong.append(float(np.abs(a @ code.matrix - 1).max()))
            amplified.append(float(np.linalg.norm(a)))
            errors.append(relative_error(code, a))
            times["decode"].append(milliseconds(lambda: code.decode(survivors)))  # noqa: B023
        times["decodable"].append(milliseconds(lambda: code.decodable(survivors)))  # noqa: B023
        times["least_squares"].append(milliseconds(lambda: by_least_squares(code, survivors)))  # noqa: B023
    found = {
        "code": name,
        "missing": pattern,
        "n": NUM_WORKERS,
        "s": STRAGGLERS,
        "load": code.load,
        "exact": code.exact,
        "sets": len(sets),
        "refused": refused,
        "construct_ms": round(construct_ms, 3),
        "ms": {each: summary(samples) for each, samples in times.items() if len(samples) > 1},
        "slowest_decode_ms": round(max(times["decode"]), 3) if times["decode"] else None,
    }
    for key, values in (("largest_miscount", wrong), ("amplification", amplified), ("relative_error", errors)):
        found[key] = {"median": float(np.median(values)), "max": max(values)} if values else None
    return found


def show_coefficients(found: dict) -> None:
    decode = found["ms"].get("decode", {"median": float("nan")})["median"]
    worst = found["slowest_decode_ms"]
    error, amplified = found["relative_error"], found["amplification"]
    figures = (
        f"{amplified['median']:>9.2g} /{amplified['max']:>8.2g} {error['median']:>9.1g} /{error['max']:>8.1g}"
        if error
        else ""
    )
    print(
        f"{found['code']:>14} {found['missing']:>9} {decode:>8.3f} {worst if worst is not None else '':>8} "
        f"{found['ms']['decodable']['median']:>9.3f} {found['ms']['least_squares']['median']:>8.2f} "
        f"{found['refused']:>5}/{found['sets']} {figures}",
        flush=True,
    )


def measure_combination(name: str, coefficients: list[float], dtype: torch.dtype, threads: int, repeats: int) -> dict:
    torch.set_num_threads(threads)
    buffer = torch.empty(NUMEL + SHIFT * (len(coefficients) - 1), dtype=dtype).uniform_(-1.0, 1.0)
    messages = [buffer[i * SHIFT : i * SHIFT + NUMEL] for i in range(len(coefficients))]
    out = torch.empty(NUMEL, dtype=dtype)

    def read(_: int) -> None:
        for message in messages:
            message.sum()

    def read_and_write(i: int) -> None:
        read(i)
        out.zero_()

    contenders = {
        "floor": read,
        "with_write": read_and_write,
        "combine": lambda _: combine(messages, coefficients, out),
    }
    turns = take_turns(contenders, "floor", repeats)
    torch.set_num_threads(1)
    gigabytes = len(messages) * NUMEL * dtype.itemsize / 1e9
    return {
        "code": name,
        "messages": len(messages),
        "shift": SHIFT,
        "numel": NUMEL,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "gigabytes_read": round(gigabytes, 2),
        "gigabytes_per_s": round(gigabytes / turns["ms"]["combine"]["median"] * 1e3, 2),
    } | turns


def measure_fingerprint(dtype: torch.dtype, repeats: int) -> dict:
    message = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    contenders = {"floor": lambda _: message.sum(), "fingerprint": lambda _: fingerprint(message)}
    turns = take_turns(contenders, "floor", repeats)
    return {"numel": NUMEL, "dtype": str(dtype).removeprefix("torch."), "threads": 1} | turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each combination; ten times as many sets")
    parser.add_argument("--note", default="", help="kept in the JSON, for what the numbers cannot say")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2 to give a spread, got {args.repeats}; the default is 7")
    torch.set_num_threads(1)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine() | {"load_at_start": os.getloadavg()[0]},
        "versions": versions() | {"numpy": np.__version__},
        "commit": commit(),
        "repeats": args.repeats,
        "note": args.note,
        "coefficients": [],
        "combination": [],
        "fingerprint": [],
    }
    print(f"{report['machine']['cpu']}; n = {NUM_WORKERS}, s = {STRAGGLERS}; medians, ms, one thread")
    print(
        f"{'':>14} {'missing':>9} {'decode':>8} {'slowest':>8} {'decodable':>9} {'lstsq':>8} {'refused':>7} "
        f"{'||a|| median / max':>19} {'rel. error float32':>19}"
    )
    for name, make in codes().items():
        for pattern, sets in missing_sets(10 * args.repeats).items():
            report["coefficients"].append(measure_coefficients(name, make, pattern, sets))
            show_coefficients(report["coefficients"][-1])
    print(f"sum of messages of {NUMEL:,} parameters: ms [quartiles], ratio to reading them once")
    survivors = range(STRAGGLERS, NUM_WORKERS)
    for name, code, dtype, threads in (
        ("binary", binary(NUM_WORKERS, STRAGGLERS), torch.float32, 1),
        ("binary", binary(NUM_WORKERS, STRAGGLERS), torch.float32, 2),
        ("binary", binary(NUM_WORKERS, STRAGGLERS), torch.bfloat16, 1),
        ("cyclic", cyclic(NUM_WORKERS, STRAGGLERS), torch.float32, 1),
        ("cyclic", cyclic(NUM_WORKERS, STRAGGLERS), torch.float32, 2),
    ):
        a = code.decode(survivors)
        coefficients = [float(value) for value in a if value != 0]
        report["combination"].append(measure_combination(name, coefficients, dtype, threads, args.repeats))
        kind = f"{name} {len(coefficients)} {str(dtype)[6:].replace('bfloat', 'bf')} x{threads}"
        show(report["combination"][-1], label=kind)
    for dtype in (torch.float32, torch.bfloat16):
        report["fingerprint"].append(measure_fingerprint(dtype, 10 * args.repeats))
        show(report["fingerprint"][-1], label=f"one message {str(dtype)[6:]}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
