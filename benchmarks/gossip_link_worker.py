"""One rank of benchmarks/gossip_link.py: trains in every way in turn, and measures each.

Started by torchrun on every host with one argument, a JSON file with seed, steps, how often to evaluate, and where
rank 0 writes its result.
"""

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from link_overlap import _both, _length, _union
from rank_result import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.cli import datasets
from distopt.gossip import Gossip, NodeBatches

BATCH, LR, MOMENTUM = 128, 0.05, 0.9
PROFILED_STEPS, WARMUP_STEPS = 24, 8
JUDGED = 2000  # test samples at each look; all of them at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How ranks agree.

    Attributes:
        label: In the table.
        gossip: None for DDP.
    """

    label: str
    gossip: Gossip | None = None


def _gossip(every: int, exchange: str) -> Way:
    label = f"gossip, {exchange}" + ("" if every == 1 else f", every {every} steps")
    return Way(label=label, gossip=Gossip(topology="one-peer-exponential", every=every, exchange=exchange))


WAYS = {
    "ddp": Way(label="DDP"),
    "gossip": _gossip(1, "synchronous"),
    "gossip-overlapped": _gossip(1, "overlapped"),
    "gossip-4": _gossip(4, "synchronous"),
    "gossip-4-overlapped": _gossip(4, "overlapped"),
}
PROFILED = ("gossip", "gossip-overlapped", "gossip-4-overlapped")


def sent_bytes() -> int:
    """By this host."""
    device = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


class Training:
    """A model that is trained in one way."""

    def __init__(self, data: datasets.Dataset, way: Way, seed: int, num_steps: int) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        self._data = data
        self._model: nn.Module = self.module if way.gossip else DistributedDataParallel(self.module)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=LR, momentum=MOMENTUM)
        decay = num_steps // 3  # down to nothing in the last third
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (num_steps - step) / max(1, decay))
        )
        self._attached = way.gossip.attach(self.module, self._optimizer) if way.gossip else None
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
        parts = [part.numpy() for part in order.tensor_split(dist.get_world_size())]
        self._batches = NodeBatches((data.train_images, data.train_labels), parts, BATCH, seed)
        self._steps = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            images, labels = self._batches.of(dist.get_rank(), self._steps)
            self._optimizer.zero_grad()
            nn.functional.cross_entropy(self._model(images), labels).backward()
            self._optimizer.step()
            self._schedule.step()
            self._steps += 1

    def settle(self) -> None:
        if self._attached is not None:
            self._attached.flush()

    @torch.no_grad()
    def accuracy(self, count: int) -> float:
        """Mean over the ranks, each with its own model and all `count` samples."""
        chosen = self._data.test_images[:count], self._data.test_labels[:count]
        right = (self.module(chosen[0]).argmax(1) == chosen[1]).double().mean()
        dist.all_reduce(right)
        return right.item() / dist.get_world_size()

    def close(self) -> None:
        if self._attached is not None:
            self._attached.detach()


def train(data: datasets.Dataset, way: Way, spec: dict[str, Any]) -> dict[str, Any]:
    training = Training(data, way, spec["seed"], spec["steps"])
    seconds, nbytes, curve = 0.0, 0, []
    for done in range(0, spec["steps"], spec["evaluate_every"]):
        dist.barrier()
        before, began = sent_bytes(), time.perf_counter()
        training.steps(min(spec["evaluate_every"], spec["steps"] - done))
        training.settle()
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        nbytes += sent_bytes() - before
        seconds += took.item()
        curve.append(
            {
                "step": training._steps,
                "seconds": round(seconds, 3),
                "bytes": nbytes,
                "accuracy": round(training.accuracy(JUDGED), 4),
            }
        )
    result = {"accuracy": training.accuracy(10_000), "seconds": seconds, "bytes": nbytes, "curve": curve}
    training.close()
    return result


def hidden(events: Iterable[Any]) -> dict[str, float]:
    """How much of the exchanges goes on while the training thread does not wait for them."""
    events = list(events)
    spans = {
        name: _union((e.time_range.start, e.time_range.end) for e in events if e.name == f"distopt::gossip::{name}")
        for name in ("exchange", "wait")
    }
    total = _length(spans["exchange"])
    waiting = _length(_both(spans["exchange"], spans["wait"]))
    # In a synchronous exchange the training thread itself is in it, and there is no span of waiting.
    computing = [e for e in events if e.name.startswith(("autograd::engine::evaluate_function", "aten::linear"))]
    compute = _union((e.time_range.start, e.time_range.end) for e in computing)
    return {
        "exchange_ms": total / 1e3,
        "waiting_ms": waiting / 1e3,
        "hidden_fraction": 1 - waiting / total if total and spans["wait"] else 0.0,
        "compute_ms": _length(compute) / 1e3,
        "under_computation_ms": _length(_both(spans["exchange"], compute)) / 1e3,
    }


def profile(data: datasets.Dataset, way: Way, spec: dict[str, Any], *, keep: bool) -> dict[str, float]:
    training = Training(data, way, spec["seed"], spec["steps"])
    training.steps(WARMUP_STEPS)
    dist.barrier()
    everybody = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], experimental_config=everybody) as profiler:
        training.steps(PROFILED_STEPS)
        training.settle()
    training.close()
    if keep and spec["trace"] and dist.get_rank() == 0:
        profiler.export_chrome_trace(spec["trace"])
    return hidden(profiler.events())


def measure_all(spec: dict[str, Any]) -> dict[str, Any]:
    data = datasets.load(datasets.FASHION_MNIST)
    result: dict[str, Any] = {"ways": {name: train(data, way, spec) for name, way in WAYS.items()}}
    if spec["profile"]:
        result["profile"] = {
            name: profile(data, WAYS[name], spec, keep=name == "gossip-overlapped") for name in PROFILED
        }
    return result


if __name__ == "__main__":
    run(measure_all)
