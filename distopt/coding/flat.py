"""A model's trainable parameters, and their gradients, as one flat CPU tensor per dtype: what messages carry."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt.comm import TensorSpec
from distopt.comm.message import DTYPES
from distopt.errors import CompatibilityError


class FlatModel:
    """One model, seen flat.

    Args:
        model: A bare module, on any device.

    Raises:
        CompatibilityError: It is wrapped in DDP, nothing of it can be trained, or messages cannot carry it.
    """

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, DistributedDataParallel):
            raise CompatibilityError(
                "gradient coding takes the bare model, got a DistributedDataParallel, whose backward waits for all "
                "ranks; pass model.module, or leave DDP out"
            )
        self.model = model
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise CompatibilityError("the model must have parameters that require a gradient, got none; unfreeze some")
        for name, p in trainable.items():
            if p.dtype not in DTYPES:
                raise CompatibilityError(
                    f"trained parameters must be of {', '.join(str(d) for d in DTYPES if d.is_floating_point)}, which "
                    f"messages carry, got {p.dtype} of {name}; keep real and imaginary parts as two, or freeze it"
                )
        self.parameters = list(trainable.values())
        self._names = list(trainable)
        dtypes = dict.fromkeys(p.dtype for p in self.parameters)
        self._groups = [[p for p in self.parameters if p.dtype == dtype] for dtype in dtypes]
        self.specs = [
            TensorSpec((sum(p.numel() for p in group),), dtype)
            for dtype, group in zip(dtypes, self._groups, strict=True)
        ]

    def read(self) -> list[Tensor]:
        """A copy of the parameters."""
        return self._join([[p.detach() for p in group] for group in self._groups])

    def write(self, flats: list[Tensor]) -> None:
        """Sets the parameters."""
        with torch.no_grad():
            for flat, group in zip(flats, self._groups, strict=True):
                for value, p in zip(flat.split([p.numel() for p in group]), group, strict=True):
                    p.copy_(value.view(p.shape))

    def clear_gradients(self) -> None:
        """Leaves no parameter a gradient; optimizers pass over those."""
        for p in self.parameters:
            p.grad = None

    def read_gradients(self) -> tuple[list[Tensor], Tensor]:
        """A copy of the gradients, zero where there is none, and for each parameter whether it has one, uint8."""
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.uint8)
        return self._join([[_gradient(p) for p in group] for group in self._groups]), used

    def write_gradients(self, flats: list[Tensor], used: Tensor) -> None:
        """Sets the gradients of the parameters that have one; the others' are cleared."""
        has_gradient = {id(p): bool(flag) for p, flag in zip(self.parameters, used, strict=True)}
        for flat, group in zip(flats, self._groups, strict=True):
            for value, p in zip(flat.split([p.numel() for p in group]), group, strict=True):
                p.grad = value.view(p.shape).to(p.device, copy=True) if has_gradient[id(p)] else None

    def describe(self) -> str:
        """A digest of names, shapes and dtypes, in order: ranks must agree on it before they exchange flat tensors."""
        described = [(name, *p.shape, str(p.dtype)) for name, p in zip(self._names, self.parameters, strict=True)]
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def fixed_values(self) -> str:
        """A digest of what no message carries: buffers and frozen parameters."""
        trained = {id(p) for p in self.parameters}
        frozen = {name: p for name, p in self.model.named_parameters() if id(p) not in trained}
        return _digest({**dict(self.model.named_buffers()), **frozen})

    def trained_values(self) -> str:
        """A digest of the trained parameters."""
        return _digest(dict(zip(self._names, self.parameters, strict=True)))

    def buffers(self) -> dict[str, str]:
        """A digest of each buffer, by name."""
        return {name: _digest({name: value}) for name, value in self.model.named_buffers()}

    @staticmethod
    def _join(groups: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat([value.reshape(-1) for value in group]).cpu() for group in groups]


def _digest(values: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
