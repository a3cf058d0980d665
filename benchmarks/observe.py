"""What it costs to watch a training: the log, events for TensorBoard, spans without a profiler.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/observe.py --json results.json

An MLP with DGC, batch 64 per rank. The ways take turns in blocks of steps, so that a disturbance hits all of them, and
each block is divided by the block without a log in its own round. Beside that the calls are measured alone, many times,
in seconds of CPU, and divided by a step's own seconds of CPU (all threads of the process): on a machine with other work
to do this is the surer figure, and more than their share of the clock's time, in which a step also waits.

Limits: steps are short, so the shares are higher than those of larger models. The log goes to a folder in /dev/shm or
the system's own for temporary files; a network file system is slower.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import distopt
from distopt.cli.machine import machine, versions
from distopt.job import LogSettings
from distopt.observe import Recorder, record
from distopt.spans import span

BASELINE = "no log"
WAYS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "log, every 50": {"every": 50},
    "log, every 10": {"every": 10},
    "log, every 1": {"every": 1},
    "log and events, every 50": {"every": 50, "tensorboard": True},
    "log and events, every 1": {"every": 1, "tensorboard": True},
}


def timed(call: Callable[[], object], repetitions: int) -> float:
    """Median microseconds of CPU of one call, of blocks of ten."""
    taken = []
    for _ in range(repetitions):
        began = time.process_time()
        for _ in range(10):
            call()
        taken.append(1e5 * (time.process_time() - began))
    return statistics.median(taken)


def empty_span() -> None:
    with span("ddp", "select"):
        pass


def spans_of(step: Callable[[], None], steps: int) -> float:
    """How many spans a step has, in all threads."""
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiled:
        for _ in range(steps):
            step()
    return sum(event.name.startswith("distopt::ddp::") for event in profiled.events()) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=50, help="steps of one way in one round")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    width = options.width
    module = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    attachment = distopt.DGC(density=0.001, exchange="allgather").attach(model, optimizer)
    images = torch.randn(64, 784, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        recorders: dict[str, Recorder | None] = {}
        for name, settings in WAYS.items():
            place = str(Path(folder) / name.replace(" ", "-"))
            recorders[name] = (
                None
                if settings is None
                else record(attachment, None, LogSettings(folder=place, report=False, **settings))
            )
        blocks: list[dict[str, float]] = []
        cpu_ms: list[float] = []
        for _ in range(options.rounds + 1):
            block = {}
            for name, recorder in recorders.items():
                dist.barrier()
                began, began_cpu = time.perf_counter(), time.process_time()
                for _ in range(options.block):
                    step()
                    if recorder is not None:
                        recorder.stepped()
                block[name] = 1e3 * (time.perf_counter() - began) / options.block
                if name == BASELINE:
                    cpu_ms.append(1e3 * (time.process_time() - began_cpu) / options.block)
            blocks.append(block)
        del blocks[0]  # buckets are rebuilt, memory is fresh, files are opened

        calls = {"a span, no profiler": timed(empty_span, 2000), "stats()": timed(attachment.stats, 100)}
        not_due = recorders["log, every 50"]
        assert not_due is not None
        not_due.stepped()
        calls["a step without a line"] = timed(not_due.stepped, 2000)
        for name, told in (("log, every 1", "a line"), ("log and events, every 1", "a line with events")):
            recorder = recorders[name]
            assert recorder is not None

            def due(recorder: Recorder = recorder) -> None:
                recorder._due = 0  # as if a step had been made
                recorder.stepped()

            calls[told] = timed(due, 100)
        for recorder in recorders.values():
            if recorder is not None:
                recorder.close()
    spans_per_step = spans_of(step, 5)
    step_cpu_ms = statistics.median(cpu_ms[1:])
    results = {}
    for name, settings in WAYS.items():
        ratios = [block[name] / block[BASELINE] for block in blocks]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {
            "ms": statistics.median(block[name] for block in blocks),
            "ratio_to_no_log": {"median": middle, "quartile_1": low, "quartile_3": high},
        }
        if settings is not None:
            every = settings["every"]
            line = calls["a line with events" if "tensorboard" in settings else "a line"]
            added_us = (line + (every - 1) * calls["a step without a line"]) / every
            results[name]["added_us_per_step"] = added_us
            results[name]["share_of_a_step"] = 1e-3 * added_us / step_cpu_ms
    spans_share = 1e-3 * spans_per_step * calls["a span, no profiler"] / step_cpu_ms
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in model.parameters())
        ranks, rounds = dist.get_world_size(), f"{options.rounds} rounds of {options.block} steps"
        print(
            f"{ranks} ranks, {parameters:,} parameters, {rounds}; {step_cpu_ms:.1f} ms of CPU in a step without a log"
        )
        print(f"{'':28}{'ms/step':>9} {'x no log, quartiles':>24} {'added CPU us':>14} {'of a step':>10}")
        for name, result in results.items():
            ratio = result["ratio_to_no_log"]
            spread = f"{ratio['median']:.3f} [{ratio['quartile_1']:.3f}, {ratio['quartile_3']:.3f}]"
            added = f"{result['added_us_per_step']:.2f}" if "added_us_per_step" in result else ""
            share = f"{result['share_of_a_step']:.3%}" if "share_of_a_step" in result else ""
            print(f"{name:28}{result['ms']:>9.2f} {spread:>24} {added:>14} {share:>10}")
        print("one call, median us of CPU: " + ", ".join(f"{name} {us:.2f}" for name, us in calls.items()))
        print(f"spans: {spans_per_step:.1f} in a step, {spans_share:.3%} of it")
        if options.json:
            content = {
                "command": shlex.join(["torchrun", "--nproc-per-node", str(dist.get_world_size()), *sys.argv]),
                "ranks": dist.get_world_size(),
                "parameters": parameters,
                "rounds": options.rounds,
                "steps_per_block": options.block,
                "machine": machine(),
                "versions": versions(),
                "results": results,
                "call_us": calls,
                "step_cpu_ms": step_cpu_ms,
                "spans_per_step": spans_per_step,
                "spans_share_of_a_step": spans_share,
            }
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    attachment.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
