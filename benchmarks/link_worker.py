"""One rank of benchmarks/link.py: takes turns between ways to communicate and measures each.

Started by torchrun on every host with one argument, a JSON file that link.py writes: task, modes, rounds, whether to
train to the target, and where rank 0 writes its result. Every mode has its own copy of the model; in each round every
mode takes a block of steps, so that a disturbance of the machine hits all of them. Bytes are those that the network
interface counts, headers of TCP and IP included.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from link_overlap import overlap
from link_tasks import MODES, MOMENTUM, TASKS, Mode, Task
from rank_result import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt

BLOCK_S = 0.6  # about the time of one turn: slow modes take fewer steps
LONGEST_BLOCK = 6
WARMUP_STEPS = 4  # buckets are rebuilt in the second step, PowerSGD begins in the third
PROFILED_STEPS = 6
SECONDS_PER_TARGET = 100.0  # a training that has not reached its target by then counts as not feasible
EVALUATE_EVERY = 20


class Contender:
    """A model that is trained in one mode, and its records."""

    def __init__(self, task: Task, mode: Mode, *, warm: bool = False) -> None:
        self.task = task
        self.seconds: list[float] = []
        self.sent_bytes = 0
        self.module = task.model()
        model: nn.Module = self.module
        if mode.ddp is not None:
            model = DistributedDataParallel(self.module, gradient_as_bucket_view=True, **mode.ddp)
            if mode.hook is not None:
                mode.hook(model)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=MOMENTUM)
        self.attachment = None
        self._clips = task.clip
        self._waits = mode.waits
        if mode.algorithm is not None:
            algorithm = mode.algorithm
            if isinstance(algorithm, distopt.DGC):
                algorithm = dataclasses.replace(algorithm, clip=task.clip)
                self._clips = None  # on each rank, before it accumulates
            if warm:
                warmup = distopt.ddp.PaperWarmup(stage=task.warmup_stage)
                algorithm = dataclasses.replace(algorithm, warmup=warmup)
            self.attachment = algorithm.attach(model, self._optimizer)
        self._losses: Iterator[torch.Tensor] = task.losses(model, seed=0)

    def step(self) -> float:
        """Takes one step and returns its seconds."""
        began = time.perf_counter()
        self._optimizer.zero_grad()
        next(self._losses).backward()
        if self._waits:
            dist.barrier()
        if self._clips is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clips)
        self._optimizer.step()
        return time.perf_counter() - began

    def turn(self, num_steps: int) -> None:
        """A block of steps that counts."""
        dist.barrier()
        before = interface_bytes()
        self.seconds += [self.step() for _ in range(num_steps)]
        self.sent_bytes += interface_bytes() - before

    def record(self) -> dict:
        """The figures of all turns."""
        figures = {"step_ms": [round(1e3 * each, 3) for each in self.seconds]}
        figures["link_bytes_per_step"] = round(self.sent_bytes / len(self.seconds))
        if self.attachment is not None:
            stats = self.attachment.stats()
            figures["overlap"] = stats["overlap"]
            figures["last_step"] = stats["last"]
        return figures


def interface_bytes() -> int:
    """Bytes that this host has sent."""
    device = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


def agreed(value: float) -> float:
    """Rank 0's value, on every rank."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return tensor.item()


def measure(contenders: dict[str, Contender], rounds: int) -> None:
    """Blocks of steps in turn."""
    blocks = {}
    for name, contender in contenders.items():
        dist.barrier()
        took = [contender.step() for _ in range(WARMUP_STEPS)]
        blocks[name] = int(agreed(max(1, min(LONGEST_BLOCK, round(BLOCK_S / took[-1])))))
    for _ in range(rounds):
        for name, contender in contenders.items():
            contender.turn(blocks[name])


def train_to_target(task: Task, mode: Mode) -> dict:
    """Trains anew until the target is reached: steps and seconds (judging and waiting for it not counted)."""
    contender = Contender(task, mode, warm=True)
    seconds, steps, figure, stops = 0.0, 0, 0.0, False
    while not stops:
        dist.barrier()
        seconds += sum(contender.step() for _ in range(EVALUATE_EVERY))
        steps += EVALUATE_EVERY
        figure = task.judge(contender.module)
        stops = bool(agreed(task.reached(figure) or seconds > SECONDS_PER_TARGET))
    return {"reached": task.reached(figure), "steps": steps, "seconds": seconds, task.judged_by: figure}


def profile(contender: Contender, trace: Path) -> dict:
    """Steps under torch.profiler; rank 0 writes the trace and says how much of the exchange backward hid."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            contender.step()
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(str(trace))
    return overlap(profiler.events())


def measure_all(spec: dict) -> dict:
    task = TASKS[spec["task"]]()
    contenders = {name: Contender(task, MODES[name]) for name in spec["modes"]}
    measure(contenders, spec["rounds"])
    result: dict = {"modes": {name: contender.record() for name, contender in contenders.items()}}
    if spec["trace"]:
        profiled = contenders[next(name for name in contenders if MODES[name].algorithm is not None)]
        result["profile"] = profile(profiled, Path(spec["trace"]))
    contenders.clear()
    for name in spec["train"]:
        result["modes"].setdefault(name, {})["training"] = train_to_target(task, MODES[name])
    result["parameters"] = sum(parameter.numel() for parameter in task.model().parameters())
    result["judged_by"], result["target"] = task.judged_by, task.target
    return result


if __name__ == "__main__":
    run(measure_all)
