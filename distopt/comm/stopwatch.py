"""Timing short work, for choices that are made at attach."""

import time
from collections.abc import Callable

import torch


def least_seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 7) -> float:
    """Seconds that the work takes on this device undisturbed: the least of `repeats` runs, behind one that warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
