"""One rank of benchmarks/local_link.py: trains in every way in turn, each for the same time, and measures it.

Started by torchrun on every host with one argument, a JSON file with the ways, seconds for each, and where rank 0
writes its result. Training goes in blocks of about a twelfth of the time; between them, while the clock stands, the
ranks agree on how much of it has passed, on the learning rate of the next block, and look at the loss.
"""

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from local_task import Task
from rank_result import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.comm import measure_link
from distopt.config import Algorithm
from distopt.local import LocalAttachment, LocalSteps
from distopt.local.rounds import first_step_of, round_of

WARMUP_STEPS, LOWEST_LR = 40, 0.1
UNCOUNTED_STEPS = 4  # of each way: DDP rebuilds its buckets in the second
COMPUTE_S = 4.0
BLOCKS = 12
CLIP = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How ranks train together.

    Attributes:
        label: In tables and plots.
        lr: The highest learning rate of the inner optimizer.
        algorithm: To attach, or None for plain DDP.
        sgd: SGD with momentum, as momentum correction needs it, in place of AdamW.
    """

    label: str
    lr: float
    algorithm: Algorithm | None = None
    sgd: bool = False

    @property
    def is_local(self) -> bool:
        """Whether ranks take steps of their own."""
        return isinstance(self.algorithm, LocalSteps)


# An outer rate and momentum that move theta by the mean change in all: 0.9 overshoots in a run of a few dozen rounds.
_DILOCO = distopt.DiLoCo(inner_steps=50, outer_lr=0.7, outer_momentum=0.3)

WAYS = {
    "dense": Way(label="dense DDP", lr=3e-3),
    "dgc": Way(
        label="DGC 0.1%", lr=0.3, algorithm=distopt.DGC(exchange="allgather", clip=2.0, masking=False), sgd=True
    ),
    "diloco": Way(label="DiLoCo, H = 50", lr=3e-3, algorithm=_DILOCO),
    "sparseloco": Way(
        label="SparseLoCo, H = 15, k = 256, overlap 2",
        lr=3e-3,
        algorithm=distopt.SparseLoCo(inner_steps=15, k=256, overlap=2, warmup_rounds=10),
    ),
    "sparseloco-30": Way(
        label="SparseLoCo, H = 30, k = 256, overlap 4",
        lr=3e-3,
        algorithm=distopt.SparseLoCo(inner_steps=30, k=256, overlap=4, warmup_rounds=5),
    ),
}


def sent_bytes() -> int:
    """By this host."""
    device = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


def agreed(value: float) -> float:
    """Rank 0's value, on every rank."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return tensor.item()


def mean(value: float) -> float:
    """Over the ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


class Training:
    """A model that is trained in one way; without one, for itself."""

    def __init__(self, task: Task, way: Way | None, seed: int) -> None:
        self._task, self._way, self._seed = task, way, seed
        self.module = task.model(seed)
        self._model: nn.Module = self.module
        if way is not None and not way.is_local:
            self._model = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        parameters = self._model.parameters()
        if way is not None and way.sgd:
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=way.lr, momentum=0.9)
        else:
            self._optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)
        self.attached = None
        if way is not None and way.algorithm is not None:
            self.attached = way.algorithm.attach(self.module if way.is_local else self._model, self._optimizer)
        self._clips = way is None or not way.sgd  # DGC clips on each rank, before it accumulates
        self.steps_done = 0

    def steps(self, count: int, lr: float) -> None:
        for _ in range(count):
            for group in self._optimizer.param_groups:
                group["lr"] = lr * min(1.0, (self.steps_done + 1) / WARMUP_STEPS)
            self._optimizer.zero_grad()
            sequences = self._task.batch(self._seed, self.steps_done, dist.get_rank())
            self._task.loss(self._model, sequences).backward()
            if self._clips:
                nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
            self._optimizer.step()
            self.steps_done += 1

    def until_a_round_ends(self, count: int) -> int:
        """At least so many steps, and where ranks exchange every few steps as many as end with an exchange."""
        if self._way is None or not isinstance(algorithm := self._way.algorithm, LocalSteps):
            return count
        ends = first_step_of(algorithm, round_of(algorithm, self.steps_done + count - 1) + 1)
        return ends - self.steps_done

    def settle(self) -> None:
        if isinstance(self.attached, LocalAttachment):
            self.attached.flush()

    def exchanging_s(self) -> float | None:
        """Seconds that this rank has waited and worked for exchanges so far, where it can tell."""
        if not isinstance(self.attached, LocalAttachment):
            return None
        stats = self.attached.stats()
        seconds: float = stats["seconds_exchanging"] + stats["seconds_selecting"]
        return seconds

    def close(self) -> None:
        if self.attached is not None:
            self.attached.detach()


def compute_only(task: Task) -> float:
    """Seconds of a step without any exchange, while all hosts compute."""
    training = Training(task, None, 0)
    training.steps(UNCOUNTED_STEPS, 1e-3)
    dist.barrier()
    began = time.perf_counter()
    while time.perf_counter() - began < COMPUTE_S:
        training.steps(5, 1e-3)
    return mean((time.perf_counter() - began) / (training.steps_done - UNCOUNTED_STEPS))


def train(task: Task, way: Way, seconds: float, seed: int) -> dict[str, Any]:
    """Trains for so many seconds, in which nobody looks at the loss."""
    training = Training(task, way, seed)
    passed, nbytes, step_s = 0.0, 0, math.inf
    curve = [{"step": 0, "seconds": 0.0, "bytes": 0, "loss": round(mean(task.held_out_loss(training.module)), 4)}]
    while passed < seconds:
        lr = way.lr * (LOWEST_LR + (1 - LOWEST_LR) * (1 + math.cos(math.pi * passed / seconds)) / 2)
        left = min(seconds / BLOCKS, seconds - passed)
        count = training.until_a_round_ends(int(agreed(max(1, math.ceil(left / step_s)))))
        dist.barrier()
        before, began = sent_bytes(), time.perf_counter()
        training.steps(count, lr)
        training.settle()
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        nbytes += sent_bytes() - before
        passed, step_s = passed + took.item(), took.item() / count
        loss = mean(task.held_out_loss(training.module))
        curve.append(
            {"step": training.steps_done, "seconds": round(passed, 2), "bytes": nbytes, "loss": round(loss, 4)}
        )
    exchanging_s = training.exchanging_s()
    result = {
        "loss": curve[-1]["loss"],
        "steps": training.steps_done,
        "seconds": passed,
        "bytes": nbytes,
        "exchanging_s": None if exchanging_s is None else mean(exchanging_s),
        "curve": curve,
    }
    training.close()
    return result


def measure_all(spec: dict[str, Any]) -> dict[str, Any]:
    task = Task(spec["text"])
    assert dist.group.WORLD is not None
    result: dict[str, Any] = {
        "parameters": sum(each.numel() for each in task.model(0).parameters()),
        "link": dataclasses.asdict(measure_link(dist.group.WORLD, torch.device("cpu"))),
    }
    before = compute_only(task)
    result["ways"] = {name: train(task, WAYS[name], spec["seconds"], spec["seed"]) for name in spec["ways"]}
    result["compute_step_s"] = [before, compute_only(task)]
    return result


if __name__ == "__main__":
    run(measure_all)
