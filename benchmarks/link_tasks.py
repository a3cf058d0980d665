"""What benchmarks/link.py trains, and the ways to communicate that it compares.

To add a way, add a line to `MODES`; to add a model, a function to `TASKS`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.cli import datasets
from distopt.ddp.algorithm import DDPAlgorithm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lm_dgc  # the example's language model, text and perplexity

MOMENTUM = 0.9
ONE_BUCKET_MB = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to communicate.

    Attributes:
        label: In the table.
        ddp: Arguments of DistributedDataParallel, or None for no exchange at all.
        hook: Registers a hook of torch's own.
        algorithm: One of distopt's, to attach.
        waits: Waits for the other hosts after each backward pass, without a gradient: what any exchange costs at least.
        alone: Runs in a job of its own, because it may take the job down with it.
    """

    label: str
    ddp: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    hook: Callable[[DistributedDataParallel], None] | None = None
    algorithm: DDPAlgorithm | None = None
    waits: bool = False
    alone: bool = False


def _fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(None, fp16_compress_hook)


def _powersgd(model: DistributedDataParallel) -> None:
    model.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2), powerSGD_hook)


MODES = {
    "compute": Mode(label="compute only", ddp=None),
    "waiting": Mode(label="compute, and wait for each other", ddp=None, waits=True),
    "dense": Mode(label="dense DDP"),
    "fp16": Mode(label="torch fp16_compress_hook", hook=_fp16),
    "powersgd": Mode(label="torch PowerSGD, rank 2", hook=_powersgd, ddp={"bucket_cap_mb": ONE_BUCKET_MB}),
    "powersgd-buckets": Mode(label="torch PowerSGD, DDP's buckets", hook=_powersgd, alone=True),
    "dgc": Mode(label="DGC 0.1%, all-gather", algorithm=distopt.DGC(exchange="allgather")),
    "dgc-16": Mode(
        label="DGC 0.1%, all-gather, fp16 + block16",
        algorithm=distopt.DGC(exchange="allgather", values="fp16", indices="block16"),
    ),
    "dgc-auto": Mode(label="DGC 0.1%, auto", algorithm=distopt.DGC(exchange="auto")),
}


class Task:
    """A model, its data and what it is judged by. One instance per process; models are made anew for each mode.

    Attributes:
        judged_by: Name of the figure that `judge` returns.
        target: The figure to reach; `reached` compares.
        lr: Learning rate.
        clip: Largest norm of the gradient, or None.
    """

    judged_by: str
    target: float
    lr: float
    clip: float | None = None
    warmup_stage: int

    def model(self) -> nn.Module:
        """A new model; the same weights on every rank and for every mode."""
        raise NotImplementedError

    def losses(self, model: nn.Module, seed: int) -> Iterator[Tensor]:
        """Endless: the loss of this rank's next batch."""
        raise NotImplementedError

    def judge(self, model: nn.Module) -> float:
        """The figure on held-out data, the same on every rank."""
        raise NotImplementedError

    def reached(self, figure: float) -> bool:
        """Whether the target is reached."""
        raise NotImplementedError


class Images(Task):
    """Classification by an MLP of 10 million parameters (28 x 28 pixels), batch 64."""

    judged_by = "test accuracy"
    target = 0.84
    lr = 0.03
    warmup_stage = 10
    batch = 64

    def __init__(self) -> None:
        self.data = datasets.load(None)
        self._judged = slice(dist.get_rank(), 2000, dist.get_world_size())  # of the test images

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        widths = [self.data.train_images[0].numel(), 2048, 2048, 2048]
        hidden = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], self.data.num_classes))

    def losses(self, model: nn.Module, seed: int) -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        images, labels = self.data.train_images, self.data.train_labels
        while True:
            chosen = torch.randint(len(images), (self.batch,), generator=order)
            yield cross_entropy(model(images[chosen]), labels[chosen])

    def judge(self, model: nn.Module) -> float:
        images, labels = self.data.test_images[self._judged], self.data.test_labels[self._judged]
        with torch.no_grad():
            judged = torch.tensor([(model(images).argmax(1) == labels).sum(), len(labels)])
        dist.all_reduce(judged)
        return (judged[0] / judged[1]).item()

    def reached(self, figure: float) -> bool:
        return figure >= self.target


class Text(Task):
    """Next-character prediction by the LSTM of examples/lm_dgc.py, 16 sequences of 32 characters."""

    judged_by = "perplexity"
    target = 4.5
    lr = 2.0
    clip = 0.5
    warmup_stage = 20
    batch = 16
    num_characters_per_step = 32
    hidden = 256

    def __init__(self) -> None:
        self.train_text, held_out, self.num_characters = lm_dgc.load_text(None)
        self.held_out = held_out[:50_000]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return lm_dgc.LanguageModel(self.num_characters, hidden=self.hidden)

    def losses(self, model: nn.Module, seed: int) -> Iterator[Tensor]:
        state = None
        for characters, following, begins in lm_dgc.batches(self.train_text, self.batch, self.num_characters_per_step):
            state = None if begins or state is None else tuple(part.detach() for part in state)
            scores, state = model(characters, state)
            yield lm_dgc.loss_of(scores, following)

    def judge(self, model: nn.Module) -> float:
        return lm_dgc.perplexity(model, self.held_out)

    def reached(self, figure: float) -> bool:
        return figure <= self.target


TASKS = {"mlp": Images, "lm": Text}
