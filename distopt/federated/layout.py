"""The averaged part of a model as one flat vector; everything else of it stays where it is.

Averaged are the trained parameters and the floating-point buffers, tied ones once. Integer buffers (BatchNorm's
counter) and frozen parameters (`requires_grad=False`) never are, and neither is what the exclusion list names: those
keep the values that each holder of the model has of its own, so a large frozen part of a model does not travel.

What is trained comes first: the vector's head, of which the algorithms' equations speak. Behind it are float buffers,
of which a server takes the weighted mean: a sum of weights other than one would make a variance negative.

Limits: one dtype for all that is averaged.
"""

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distopt.errors import CompatibilityError, ConfigError

NORMALISATION = "batch-norm"  # in an exclusion list: all parameters and buffers of BatchNorm layers


class Layout:
    """Where each averaged tensor of a model lies in the flat vector.

    Args:
        model: Any module.
        exclude: Names that are not averaged, with `*` as in file names; "batch-norm" stands for BatchNorm's.

    Raises:
        ConfigError: A name in `exclude` fits nothing in the model.
        CompatibilityError: Nothing is left to train, or tensors differ in dtype.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str] = ()) -> None:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # tied ones once
        left_out = _excluded(model, named, exclude)
        left_out |= {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        kept = {name: t for name, t in named.items() if name not in left_out and t.is_floating_point()}
        trained = {name: t for name, t in kept.items() if t.requires_grad}
        if not trained:
            raise CompatibilityError(
                "there must be something to train among what is averaged, got a model without; exclude less of it, or "
                "set requires_grad"
            )
        dtypes = {t.dtype: name for name, t in kept.items()}
        if len(dtypes) > 1:
            described = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
            raise CompatibilityError(
                f"what is averaged must have one dtype, got {described}; convert the model, or exclude some of it"
            )
        kept = trained | kept
        self.trained_names = tuple(trained)
        self.names = tuple(kept)
        self.shapes = tuple(t.shape for t in kept.values())
        self.dtype = next(iter(dtypes))
        self.num_trained = sum(t.numel() for t in trained.values())  # d of the algorithms
        self.num_elements = sum(t.numel() for t in kept.values())

    @property
    def description(self) -> list[str]:
        """Of each averaged tensor, in order: its name, shape and dtype, and whether it is trained."""
        return [
            f"{name} {list(shape)} {self.dtype}{' trained' if name in self.trained_names else ''}"
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]

    @property
    def trained_bytes(self) -> int:
        """Of a vector (d,)."""
        return self.num_trained * self.dtype.itemsize

    def read(self, model: nn.Module) -> Tensor:
        """(num_elements,), a copy of the averaged tensors."""
        tensors = _tensors(model)
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    @torch.no_grad()
    def write(self, model: nn.Module, vector: Tensor) -> None:
        """Sets the averaged tensors.

        Raises:
            ConfigError: The vector has another length; nothing was changed.
        """
        if vector.shape != (self.num_elements,):
            raise ConfigError(
                f"the vector must have {self.num_elements} elements, got {vector.numel()}; it is of another model or "
                "of another exclusion list"
            )
        tensors = _tensors(model)
        for name, part in self.split(vector).items():
            tensors[name].copy_(part)

    def others(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of such a model that are not averaged, themselves."""
        return {name: t.detach() for name, t in _tensors(model).items() if name not in self.names}

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """The trained parameters of such a model, in order."""
        tensors = dict(model.named_parameters())
        return [tensors[name] for name in self.trained_names]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector `(..., num_elements)` by name, each `(..., *shape)`."""
        parts = vector.split([shape.numel() for shape in self.shapes], dim=-1)
        return {
            name: part.view((*vector.shape[:-1], *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _excluded(model: nn.Module, named: dict[str, Tensor], exclude: Sequence[str]) -> set[str]:
    if isinstance(exclude, str):
        raise ConfigError(f"exclude must be a list of names, got {exclude!r}; write [{exclude!r}]")
    found: set[str] = set()
    for pattern in exclude:
        if pattern == NORMALISATION:
            layers = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
            fitting = {name for name in named if name.rpartition(".")[0] in layers}
        else:
            fitting = set(fnmatch.filter(named, pattern))
        if not fitting:
            raise ConfigError(f"exclude must name what the model has, got {pattern!r}; it has {', '.join(named)}")
        found |= fitting
    return found
