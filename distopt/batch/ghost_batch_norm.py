"""Ghost batch normalisation: large batches are normalised in pieces of the size that small batches had.

Source: Hoffer, Hubara and Soudry, *Train Longer, Generalize Better*, NeurIPS 2017 (1705.08741), algorithm 1.

Limits: ghost batches are pieces of the batch that a rank's module is given: a micro-batch of at most `size` samples is
one ghost batch, and nothing differs from plain batch normalisation. One normalisation is called per ghost batch.
"""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from distopt.config import check_count
from distopt.errors import CompatibilityError

Model = TypeVar("Model", bound=nn.Module)


class _GhostBatchNorm(_BatchNorm):
    """A batch normalisation that has been swapped: the same parameters, buffers, hooks and place in the model."""

    ghost_size: int
    plain: ClassVar[type[_BatchNorm]]

    def forward(self, input: Tensor) -> Tensor:
        """Each ghost batch normalised by itself; in evaluation the whole batch at once."""
        if not self.training or len(input) <= self.ghost_size:
            return super().forward(input)
        sizes = ghost_sizes(len(input), self.ghost_size)
        return torch.cat([super(_GhostBatchNorm, self).forward(piece) for piece in input.split(sizes)])

    def extra_repr(self) -> str:
        """The setting, beside those of the plain module."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"  # type: ignore[no-untyped-call]  # torch's


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """What `ghost_batch_norm_` makes of an `nn.BatchNorm1d`."""

    plain = nn.BatchNorm1d


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """What `ghost_batch_norm_` makes of an `nn.BatchNorm2d`."""

    plain = nn.BatchNorm2d


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """What `ghost_batch_norm_` makes of an `nn.BatchNorm3d`."""

    plain = nn.BatchNorm3d


_GHOSTS: dict[type[Any], type[_GhostBatchNorm]] = {
    ghost.plain: ghost for ghost in (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)
}


def ghost_sizes(samples: int, size: int) -> list[int]:
    """How many samples each ghost batch of a batch has: `size`, and the rest in the last one.

    A single sample has no variance: where the rest is one, it belongs to the ghost batch before.
    """
    sizes = [size] * (samples // size)
    rest = samples % size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def ghost_batch_norm_(model: Model, size: int = 128) -> Model:
    """Makes every batch normalisation of a model, in place, one over ghost batches of `size` samples.

    In training each piece of `size` samples is normalised by its own mean and variance, and the running statistics are
    updated once for each piece. A last piece of a single sample is joined to the one before. Evaluation does not
    change. Parameters, buffers, names (so also `state_dict()`) and hooks stay what they are: it may be called before or
    after the model is given to an optimizer or to DistributedDataParallel, and again with another size.

    Args:
        model: With `nn.BatchNorm1d`, `2d` or `3d` modules in it, or one itself. `plain_batch_norm_` undoes it.
        size: Samples of a ghost batch; the batch on one device for which the model was designed. The paper uses 128.

    Returns:
        The model.

    Raises:
        ConfigError: `size` is below 2.
        CompatibilityError: There is no such module, or one that cannot be swapped: a SyncBatchNorm, a lazy one that
            has not seen a batch, or a class of somebody else's. Nothing is changed then.
    """
    check_count("size", size, low=2, remedy="use 128, or the batch on one device for which the model was designed")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise CompatibilityError(
            f"ghost batch normalisation needs a model with nn.BatchNorm1d, 2d or 3d, got {type(model).__name__} "
            "without any; leave it out"
        )
    for name, module in found:
        if not isinstance(module, _GhostBatchNorm) and type(module) not in _GHOSTS:
            raise CompatibilityError(
                f"ghost batch normalisation replaces nn.BatchNorm1d, 2d and 3d, got {name or 'the model'!r}, which is "
                f"{type(module).__module__}.{type(module).__qualname__}; {_remedy(module)}"
            )
    for _, module in found:
        if not isinstance(module, _GhostBatchNorm):
            module.__class__ = _GHOSTS[type(module)]
        module.ghost_size = size  # type: ignore[assignment]  # mypy does not follow the change of class
    return model


def plain_batch_norm_(model: Model) -> Model:
    """Undoes `ghost_batch_norm_`, in place: plain batch normalisation, with the running statistics as they are now."""
    for module in model.modules():
        if isinstance(module, _GhostBatchNorm):
            module.__class__ = module.plain  # type: ignore[assignment]  # back to what it was
            del module.ghost_size
    return model


def _remedy(module: nn.Module) -> str:
    if isinstance(module, nn.SyncBatchNorm):
        return (
            "its batch is that of all ranks, the opposite of ghost batches: leave convert_sync_batchnorm() out to have "
            "ghost batches, or leave this out"
        )
    if isinstance(module, _LazyNormBase):
        return "give the model one batch first: a lazy module becomes a plain one then"
    return "make it a plain one, or call ghost_batch_norm_() on the parts of the model that have none of these"
