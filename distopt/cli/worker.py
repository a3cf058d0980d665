"""One rank of a comparison: an ordinary DDP training loop with a distopt algorithm attached, once for each job.

Started by torchrun through `distopt.cli.job.launch` with two arguments, the file of jobs and the file for events.
Events are JSON lines. Every rank writes `joined` (its process id); rank 0 writes, for each job and with its label,
`started`, `step`, `evaluated` and `finished`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from distopt.cli.datasets import Dataset, load
from distopt.cli.job import Job, read_jobs
from distopt.cli.models import Model
from distopt.ddp.algorithm import DDPAlgorithm

Emit = Callable[..., None]
_PROGRESS_S = 0.5  # between two `step` events


@record
def main() -> None:
    """Trains the jobs named on the command line, as one rank of torchrun's group."""
    jobs, events = read_jobs(Path(sys.argv[1])), Path(sys.argv[2])

    def emit(event: str, **fields: Any) -> None:
        with events.open("a") as file:  # one short write in append mode: lines of two ranks never mix
            file.write(json.dumps({"event": event, **fields}) + "\n")

    emit("joined", pid=os.getpid())
    dist.init_process_group("gloo")
    try:
        for label, job in jobs.items():
            emit_job = partial(emit, label=label) if dist.get_rank() == 0 else _silent
            emit_job("started")
            emit_job("finished", result=train(job, load(job.data), emit_job))
    finally:
        dist.destroy_process_group()


def _silent(event: str, **fields: Any) -> None:
    """Emits nothing: all ranks see the same, and rank 0 says it."""


def train(job: Job, data: Dataset, emit: Emit) -> dict[str, Any]:
    """Trains on this rank's share of the data; the same on every rank but for timings.

    Returns:
        Final test accuracy in [0, 1], seconds of all training steps (loading included, evaluation not), the
        attachment's `stats()`, the number of parameters, and whether all ranks ended with the same bits.
    """
    torch.manual_seed(job.seed)
    model = DistributedDataParallel(Model.from_dict({"model": job.model}).build(data.shape, data.num_classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr, momentum=job.momentum, weight_decay=job.weight_decay)
    scheduler = CosineAnnealingLR(optimizer, job.steps)
    attachment = DDPAlgorithm.from_dict(job.algorithm).attach(model, optimizer)
    batches = _batches(job, data)
    training_s, accuracy = 0.0, 0.0
    mark = shown = time.perf_counter()
    for step in range(1, job.steps + 1):
        images, labels = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()
        if time.perf_counter() - shown > _PROGRESS_S:
            emit("step", step=step)
            shown = time.perf_counter()
        if step % job.evaluate_every == 0 or step == job.steps:
            training_s += time.perf_counter() - mark
            accuracy = _accuracy(model.module, data)
            emit("evaluated", step=step, accuracy=accuracy, bytes_sent=attachment.stats()["bytes_sent"])
            mark = time.perf_counter()
    return {
        "accuracy": accuracy,
        "training_s": training_s,
        "stats": attachment.stats(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ranks_identical": _ranks_identical(model.module),
    }


def _batches(job: Job, data: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    images = TensorDataset(data.train_images, data.train_labels)
    sampler: DistributedSampler[Any] = DistributedSampler(images, seed=job.seed, drop_last=True)
    # Batches of indices in place of single ones: one indexing operation per batch instead of one per image.
    batches = BatchSampler(sampler, job.batch, drop_last=True)
    loader: DataLoader[Any] = DataLoader(images, sampler=batches, batch_size=None)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def _accuracy(model: nn.Module, data: Dataset) -> float:
    """Test accuracy, each rank judging its share of the images."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images, labels = data.test_images[rank::world_size], data.test_labels[rank::world_size]
    model.eval()
    with torch.no_grad():
        correct = sum(
            (model(batch).argmax(1) == truth).sum()
            for batch, truth in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
        )
    model.train()
    total = torch.as_tensor(correct)
    dist.all_reduce(total)
    return total.item() / len(data.test_labels)


def _ranks_identical(model: nn.Module) -> bool:
    content = b"".join(parameter.detach().contiguous().numpy().tobytes() for parameter in model.parameters())
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(content).hexdigest())
    return len(set(digests)) == 1


if __name__ == "__main__":
    main()
