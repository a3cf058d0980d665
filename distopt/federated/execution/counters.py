"""BatchNorm's counters of batches, which belong to the model object: they count all clients' batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def count_batches(model: nn.Module, count: int) -> None:
    """The counters go so much further, for batches that were computed elsewhere."""
    for module in model.modules():
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None:
            module.num_batches_tracked += count


@contextmanager
def uncounted(model: nn.Module, counted: Callable[[], int]) -> Iterator[None]:
    """The model leaves them alone; at the end they are as much further as `counted()` is."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    counters = [layer.num_batches_tracked for layer in layers]
    for layer in layers:
        layer.num_batches_tracked = None
    before = counted()
    try:
        yield
    finally:
        for layer, counter in zip(layers, counters, strict=True):
            layer.num_batches_tracked = counter
            if counter is not None:
                counter += counted() - before
