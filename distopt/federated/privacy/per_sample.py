"""Gradients of single samples, clipped one by one and added up: what differential privacy is computed on.

    sum_j clip(grad l_j(x), C)     or     sum_j clip(grad l_j(x) - grad l_j(x'), C),     clip(g, C) = g min(1, C/||g||)

Nothing is averaged within a batch: a mean of batch means would count a sample of a short last batch more than others.
Whoever wants the mean divides the sum by the number of samples, once. A gradient that is not finite counts as zero: a
NaN in the sum would show that such a sample is there.

Limits: a model computes its samples one by one, so BatchNorm and dropout are refused; the loss must be one that
`torch.func.vmap` can compute. Norms and the sum are float64, gradients have the model's dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _NormBase

from distopt.errors import CompatibilityError
from distopt.federated.functional import Batch, Loss, LossModule

LIMIT_BYTES = 64 << 20  # of the gradients that are in memory at a time


def clipped_sum(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    batch: Batch,
    bound: float,
    *,
    previous: Tensor | None = None,
    limit_bytes: int = LIMIT_BYTES,
) -> Tensor:
    """(d,) float64, the sum over samples of each one's clipped gradient, see the module.

    Args:
        model: As it is: its parameters are x.
        parameters: Some of its own; their elements, flat and in this order, are the d.
        loss: Of a batch, here of one sample.
        batch: (n, ...) each, n >= 0.
        bound: C, at least 0.
        previous: (d,), x', where the gradient of a difference is asked for.
        limit_bytes: Of the samples' gradients in memory at a time; at least one sample is.
    """
    whole = LossModule(model, loss)
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    here = {names[id(parameter)]: parameter.detach() for parameter in parameters}
    of_each = vmap(
        grad(lambda at, sample: functional_call(whole, at, (sample,))), in_dims=(None, 0), randomness="error"
    )
    there = None if previous is None else _split(previous, here)
    width = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(width, dtype=torch.float64, device=parameters[0].device)
    for samples in _chunks(batch, max(1, limit_bytes // (_COPIES * width * total.itemsize))):
        gradients = _flat(of_each(here, samples), here)
        if there is not None:
            gradients -= _flat(of_each(there, samples), here)
        total += _sum_of_clipped(gradients, bound)
    return total


def check_per_sample(model: nn.Module) -> None:
    """Raises `CompatibilityError` if a layer of the model does not compute its samples one by one, or draws."""
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, _NormBase) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
            raise CompatibilityError(
                f"per-sample gradients need a model that computes its samples one by one, got the {kind} {name!r}, "
                "whose output for a sample depends on the others; use GroupNorm or LayerNorm"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise CompatibilityError(
                f"per-sample gradients need a model that draws nothing, got the {kind} {name!r} with p={layer.p}; "
                "leave it out: the noise regularises"
            )


_COPIES = 3  # gradients of a chunk at a time: both points', and what is made of them


def _chunks(batch: Batch, size: int) -> list[Batch]:
    """Parts of the batch, in which every sample has a batch dimension of its own."""
    alone = [part.unsqueeze(1) for part in batch]
    return list(zip(*(part.split(size) for part in alone), strict=True)) if len(batch[0]) else []


def _split(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def _flat(gradients: dict[str, Tensor], order: dict[str, Tensor]) -> Tensor:
    """(samples, d)."""
    return torch.cat([gradients[name].flatten(1) for name in order], dim=1)


def _sum_of_clipped(gradients: Tensor, bound: float) -> Tensor:
    """(d,) float64."""
    norms = torch.linalg.vector_norm(
        gradients, dim=1, dtype=torch.float64
    )  # whose squares may be too large for float32
    finite = norms.isfinite()
    if not finite.all():
        gradients, norms = gradients[finite], norms[finite]
    factors = bound / norms.clamp_min(bound) if bound > 0 else torch.zeros_like(norms)
    return factors @ gradients.double()
