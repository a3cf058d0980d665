"""Layers of many clients under `torch.func.vmap`, in the form that is fast on a CPU.

What treats channels or groups of channels apart takes the clients as further channels, in the memory format
"channels last", in which convolution, pooling and normalisation read memory in order, and from one to the next nothing
is copied. A linear layer multiplies from the left, so that its weight's gradient comes in the weight's own order.

Results are the layers' own but for rounding. vmap's own batch norm would also lose the running statistics where they
are not contiguous.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Folded = Callable[..., Tensor]  # of the number of clients and the folded tensors


class FoldedLayers(TorchFunctionMode):
    """Where it is active, within `vmap`, layers are computed as the module says."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces the functions that the module is about."""
        return _LAYERS.get(func, func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = input.reshape(-1, input.shape[-1])
    output = torch.mm(weight, flat.mT)
    if bias is not None:
        output = output + bias[:, None]
    return output.mT.reshape(*input.shape[:-1], weight.shape[0])


def _fold(tensor: Tensor, dim: int | None, num_clients: int) -> Tensor:
    """(batch, num_clients * channels, ...) of (batch, channels, ...) with the clients' dimension at `dim`."""
    tensor = tensor[:, None].expand(-1, num_clients, *tensor.shape[1:]) if dim is None else tensor.movedim(dim, 1)
    folded = tensor.permute(0, *range(3, tensor.dim()), 1, 2).flatten(-2).movedim(-1, 1)
    return folded.contiguous(memory_format=_format(folded))


def _format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def _fold_first(tensor: Tensor | None, dim: int | None, num_clients: int) -> Tensor | None:
    """(num_clients * channels, ...) of (channels, ...), of the same memory where that is possible."""
    if tensor is None:
        return None
    tensor = tensor.expand(num_clients, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


class _Folded(torch.autograd.Function):
    """The way to the physical tensors: vmap hands them to `vmap`, and autograd sees what is done there, not this."""

    @staticmethod
    def forward(folded: Folded, *tensors: Tensor | None) -> Tensor:
        raise NotImplementedError("a layer whose input and parameters are the same for all clients")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], folded: Folded, *tensors: Tensor | None) -> tuple[Tensor, int]:
        dims, count = in_dims[1:], info.batch_size
        assert tensors[0] is not None
        parameters = [_fold_first(tensor, dim, count) for tensor, dim in zip(tensors[1:], dims[1:], strict=True)]
        output = folded(count, _fold(tensors[0], dims[0], count), *parameters)
        return output.unflatten(1, (count, -1)), 1


def _apply(folded: Folded, *tensors: Tensor | None) -> Tensor:
    output: Tensor = _Folded.apply(folded, *tensors)  # type: ignore[no-untyped-call]
    return output


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    def folded(count: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups * count)

    return _apply(folded, input, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    def folded(
        count: int, input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return functional.batch_norm(input, mean, var, weight, bias, training, momentum, eps)

    return _apply(folded, input, running_mean, running_var, weight, bias)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    def folded(count: int, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # The kernel for channels last is half as fast as the other one with both copies.
        output = functional.group_norm(input.contiguous(), num_groups * count, weight, bias, eps)
        return output.contiguous(memory_format=_format(output))

    return _apply(folded, input, weight, bias)


def _pool(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def pool(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _apply(lambda count, input: layer(input, *args, **kwargs), input)

    return pool


_LAYERS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.conv2d: _conv2d,
    functional.batch_norm: _batch_norm,
    functional.group_norm: _group_norm,
    functional.max_pool2d: _pool(functional.max_pool2d),
    functional.avg_pool2d: _pool(functional.avg_pool2d),
    functional.adaptive_avg_pool2d: _pool(functional.adaptive_avg_pool2d),
}
