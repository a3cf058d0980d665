"""What the benchmarks of gossip have in common: real ranks on this machine, and the digits as nodes get them.

A job of ranks has a deadline, and ends as a whole when one of them fails.
"""

import itertools
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

TEST_SAMPLES = 360


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, deadline_s: float) -> Any:
    """Rank 0's result of `function(*arguments)` on so many new processes with a gloo group and one thread each."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            spawn.Process(target=_rank, args=(rank, size, folder, function, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        end = time.monotonic() + deadline_s
        try:
            while any(process.exitcode is None for process in started) and time.monotonic() < end:
                if any(process.exitcode for process in started):
                    break
                time.sleep(0.1)
        finally:
            codes = [process.exitcode for process in started]
            for process in started:
                if process.exitcode is None:
                    process.kill()
                process.join()
        if any(code != 0 for code in codes):
            raise SystemExit(f"ranks ended with {codes} (None: stopped after {deadline_s:.0f} s, or with the others)")
        return pickle.loads(Path(folder, "result").read_bytes())


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    result = function(*arguments)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def digits(inputs: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1437 training images (n, 64) and their labels, then 360 for the test.

    Args:
        inputs: "/16" for pixels between 0 and 1, "standardised" for pixels of mean 0 and variance 1 each.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    count = len(labels) - TEST_SAMPLES
    if inputs == "standardised":
        images = (images - images[:count].mean(0)) / (images[:count].std(0) + 1e-6)
    else:
        images = images / 16
    pixels, targets = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    return pixels[:count], targets[:count], pixels[count:], targets[count:]


def deep_mlp(*, layer_norm: bool = False) -> nn.Module:
    """64-64-64-64-64-10 with ReLU, Xavier's weights and biases of 0."""
    widths, parts = [64, 64, 64, 64, 64, 10], []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        parts += [linear, nn.LayerNorm(fan_out), nn.ReLU()] if layer_norm else [linear, nn.ReLU()]
    while not isinstance(parts[-1], nn.Linear):
        parts.pop()
    return nn.Sequential(*parts)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of samples that it gets right."""
    return float((model(images).argmax(1) == labels).float().mean())
