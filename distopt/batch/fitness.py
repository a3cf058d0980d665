"""What must be so before a batch can grow: checked at attach, before anything is changed."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distopt.batch.sampler import GrowingBatchSampler
from distopt.errors import CompatibilityError, ConfigError
from distopt.gradients import Observable

_log = logging.getLogger("distopt")


def sampler_of(loader: Any) -> GrowingBatchSampler:
    """The sampler of a loader whose batch can change.

    Raises:
        CompatibilityError: It cannot.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, GrowingBatchSampler):
        if not getattr(loader, "in_order", True):
            raise CompatibilityError(
                "the batches must come in the sampler's order, which says how many samples a step has, got a loader "
                "with in_order=False; leave that out"
            )
        return sampler
    remedy = (
        "use DataLoader(dataset, batch_sampler=distopt.batch.GrowingBatchSampler(dataset, batch_size=32)), without "
        "batch_size, shuffle and sampler of its own"
    )
    if isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
        raise CompatibilityError(
            "the batch can grow only where samples are chosen by number, got a loader of an iterable data set "
            f"({type(loader.dataset).__name__}), whose size cannot change; give the data set __getitem__ and __len__, "
            f"then {remedy}"
        )
    size = getattr(loader, "batch_size", None)
    raise CompatibilityError(
        f"the loader's batch size must be able to change, got {type(loader).__name__}"
        f"{'' if size is None else f' with batch_size={size}'}; {remedy}"
    )


def check_beside(beside: Observable | None, group: dist.ProcessGroup | None) -> None:
    """Raises `CompatibilityError` unless what the ranks have attached tells of gradients that a test can use."""
    if beside is None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise CompatibilityError(
                f"a test of {dist.get_world_size()} ranks needs the mean of their gradients, got beside=None; use "
                "beside=distopt.Dense().attach(model, optimizer), which averages as DDP does"
            )
        return
    if not hasattr(beside, "observe_gradients"):
        family = getattr(beside, "family", type(beside).__name__)
        raise CompatibilityError(
            f"a test needs the mean of all ranks' gradients, got an attachment of {family!r}, which makes none; "
            "use beside= an attachment of Dense, TopK, DGC, DiLoCo or SparseLoCo, or leave AdaptiveBatch out"
        )
    if group is None:
        raise CompatibilityError(
            "the ranks of an adaptive batch begin together, got an attachment that has joined later; start all "
            "ranks anew, or leave AdaptiveBatch out"
        )
    if shard := getattr(beside, "shard", ""):
        raise CompatibilityError(
            f"a test needs whole gradients, got shard {shard} of them; leave AdaptiveBatch out where the model is "
            "sharded"
        )


def check_sampler(sampler: GrowingBatchSampler, model: nn.Module, rank: int, num_ranks: int) -> None:
    """Raises `CompatibilityError` unless it is this rank's and leaves the model's BatchNorm two samples or more."""
    if (sampler.rank, sampler.num_replicas) != (rank, num_ranks):
        raise CompatibilityError(
            f"the sampler must be of rank {rank} of {num_ranks}, got {sampler.rank} of "
            f"{sampler.num_replicas}; leave num_replicas and rank out, or give those of the process group"
        )
    normalised = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    if normalised:
        sampler.at_least = 2
        fewest = min(sampler.micro_batch, sampler.length // num_ranks)
        if fewest < 2:
            raise CompatibilityError(
                f"batch normalisation ({normalised[0]!r}) needs micro-batches of at least 2 samples, got {fewest}; "
                "use batch_size=2 or more, torch.nn.SyncBatchNorm, or another normalisation"
            )


def largest_batch(max_batch: int, sampler: GrowingBatchSampler, num_ranks: int) -> int:
    """The largest batch there can be: a multiple of the ranks, and no more than the data.

    Raises:
        ConfigError: It is below the batch at the start.
    """
    start, largest = sampler.batch_size, max_batch
    if largest < start:
        raise ConfigError(
            f"max_batch must be at least the batch at the start, got {largest} and {start} ({num_ranks} "
            f"ranks with {sampler.micro_batch} each); use a larger max_batch, or a smaller batch_size of the "
            "sampler"
        )
    if largest > sampler.length:
        _log.info("the batch grows to no more than the data set, %d samples", sampler.length)
    return max(start, min(largest, sampler.length) // num_ranks * num_ranks)
