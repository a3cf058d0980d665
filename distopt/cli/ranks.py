"""The ranks that a launcher has started, as a gloo group for the time of a command."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist


def started() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Joins them, if there are several; this one's rank, 0 if it is alone."""
    if not started():
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Waits until every rank that has joined is here."""
    if dist.is_initialized():
        dist.barrier()
