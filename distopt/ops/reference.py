"""Each operation in obvious torch: the definition that the native kernels are compared to, bit for bit.

Runs on every device and dtype that torch has, also where no compiler was found. Written to be read, not to be fast.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distopt.ops import checks

_BLOCK_NBYTES = 1 << 21  # of a sum: small enough for a cache, large enough that calls into torch cost little


def topk_abs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `distopt.ops.topk_abs`."""
    magnitude = x.abs()
    # NaN ranks largest: as its own class above +inf. A stable sort keeps the lowest index first among equals.
    order = torch.argsort(magnitude, descending=True, stable=True)
    nan_first = torch.argsort(magnitude[order].isnan().to(torch.int8), descending=True, stable=True)
    indices = order[nan_first][:k].sort().values
    return x[indices], indices.to(torch.int32)


def ef_sparsify_(grad: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `distopt.ops.ef_sparsify_`."""
    dtype = compute_dtype(residual)
    residual.copy_(residual.to(dtype) + grad.to(dtype))  # a 16-bit residual rounds here, once
    values, indices = topk_abs(residual, k)
    residual[indices.long()] = 0
    return values.to(dtype), indices


def dgc_sparsify_(
    grad: Tensor, u: Tensor, v: Tensor, k: int, *, momentum: float, nesterov: bool = False, masking: bool = True
) -> tuple[Tensor, Tensor]:
    """See `distopt.ops.dgc_sparsify_`."""
    dtype = compute_dtype(u)
    g, u_new, v_new = grad.to(dtype), u.to(dtype), v.to(dtype)
    if nesterov:
        u_new = (u_new + g) * momentum
        v_new = v_new + (u_new + g)
    else:
        u_new = u_new * momentum + g
        v_new = v_new + u_new
    u.copy_(u_new)
    v.copy_(v_new)  # a 16-bit v rounds here, and what it holds after rounding is what is selected and sent
    values, indices = topk_abs(v, k)
    v[indices.long()] = 0
    if masking:
        u[indices.long()] = 0
    return values.to(dtype), indices


def ef_sparsify_segments_(grad: Tensor, residual: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `distopt.ops.ef_sparsify_segments_`."""

    def sparsify(part: Tensor, state: slice, k: int) -> tuple[Tensor, Tensor]:
        return ef_sparsify_(part, residual[state], k)

    return _in_each_segment(sparsify, grad, residual, segments, count)


def dgc_sparsify_segments_(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    segments: Tensor,
    count: int,
    *,
    momentum: float,
    nesterov: bool = False,
    masking: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `distopt.ops.dgc_sparsify_segments_`."""

    def sparsify(part: Tensor, state: slice, k: int) -> tuple[Tensor, Tensor]:
        return dgc_sparsify_(part, u[state], v[state], k, momentum=momentum, nesterov=nesterov, masking=masking)

    return _in_each_segment(sparsify, grad, u, segments, count)


def ef_take_segments_(grad: Tensor, residual: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `distopt.ops.ef_take_segments_`."""

    def sparsify() -> tuple[Tensor, Tensor]:
        return ef_sparsify_segments_(grad, residual, segments, count)

    return _take(sparsify, grad, residual, segments, count)


def dgc_take_segments_(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    segments: Tensor,
    count: int,
    *,
    momentum: float,
    nesterov: bool = False,
    masking: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `distopt.ops.dgc_take_segments_`."""

    def sparsify() -> tuple[Tensor, Tensor]:
        return dgc_sparsify_segments_(
            grad, u, v, segments, count, momentum=momentum, nesterov=nesterov, masking=masking
        )

    return _take(sparsify, grad, v, segments, count)


def topk_abs_interleaved(x: Tensor, k: int, num_owners: int) -> tuple[Tensor, Tensor]:
    """See `distopt.ops.topk_abs_interleaved`."""
    chosen = [topk_abs(x[owner::num_owners], k) for owner in range(num_owners)]
    return torch.stack([values for values, _ in chosen]), torch.stack([indices for _, indices in chosen])


def scatter_add_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """See `distopt.ops.scatter_add_`."""
    checks.index_range(indices, out.numel())
    values = values.to(out.dtype)
    if out.is_cuda:
        # index_add_ is atomic there and would not be bit-equal on all ranks; indices of one call are unique
        out[indices.long()] += values
    else:
        out.index_add_(0, indices.long(), values)


def all_finite(x: Tensor) -> bool:
    """See `distopt.ops.all_finite`."""
    return bool(torch.isfinite(x).all())


def scale_(x: Tensor, factor: float) -> bool:
    """See `distopt.ops.scale_`."""
    finite = all_finite(x)
    x.mul_(factor)
    return finite


def momentum_step_(grad: Tensor, u: Tensor, *, momentum: float, nesterov: bool = False) -> None:
    """See `distopt.ops.momentum_step_`."""
    if nesterov:
        grad.add_(u.add_(grad).mul_(momentum))
    else:
        grad.copy_(u.mul_(momentum).add_(grad))


def decay_step_(
    update: Tensor,
    starts: Sequence[int],
    buffers: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    rate: float,
    momentum: float,
    nesterov: bool = False,
) -> None:
    """See `distopt.ops.decay_step_`."""
    checks.parameter_places(update, starts, buffers, parameters)
    if not parameters:
        return
    # A few calls for all tensors. Each product and each sum rounds: add_(p, alpha=rate) may or may not be one rounding.
    parts = [update[start : start + d.numel()] for start, d in zip(starts, buffers, strict=True)]
    states = list(buffers)
    in_memory_order = [p.as_strided((p.numel(),), (1,)).to(update.dtype) for p in parameters]
    added = torch._foreach_mul(in_memory_order, rate)
    if nesterov:
        torch._foreach_add_(states, added)
        torch._foreach_mul_(states, momentum)
        torch._foreach_add_(parts, states)
        torch._foreach_add_(parts, added)
    else:
        torch._foreach_mul_(states, momentum)
        torch._foreach_add_(states, added)
        torch._foreach_add_(parts, states)


def weighted_sum_(out: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """See `distopt.ops.weighted_sum_`."""
    block = _BLOCK_NBYTES // out.dtype.itemsize
    for target, parts in zip(out.split(block), zip(*(row.split(block) for row in rows), strict=True), strict=True):
        torch.mul(parts[0].to(out.dtype), weights[0], out=target)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            target.add_(part.to(out.dtype) * weight)  # add_(part, alpha=weight) may or may not round the product


def _in_each_segment(
    sparsify: Callable[[Tensor, slice, int], tuple[Tensor, Tensor]],
    grad: Tensor,
    state: Tensor,
    segments: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    checks.segment_rows(segments, count, grad.numel(), state.numel())
    values = torch.empty(count, dtype=compute_dtype(state), device=grad.device)
    indices = torch.empty(count, dtype=torch.int32, device=grad.device)
    position, taken = 0, 0
    for start, numel, k in segments.tolist():
        part, local = sparsify(grad[start : start + numel], slice(position, position + numel), k)
        values[taken : taken + k] = part
        indices[taken : taken + k] = local + start
        position += numel
        taken += k
    return values, indices


def _take(
    sparsify: Callable[[], tuple[Tensor, Tensor]], grad: Tensor, state: Tensor, segments: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    checks.segment_rows(segments, count, grad.numel(), state.numel())
    parts = [grad[start : start + numel] for start, numel, _ in segments.tolist()]
    bad = next((row for row, part in enumerate(parts) if not all_finite(part)), -1)
    if bad < 0:
        values, indices = sparsify()
        for part in parts:
            part.zero_()
    else:  # here nothing has happened; a kernel may have accumulated what is finite
        values = torch.zeros(count, dtype=compute_dtype(state), device=grad.device)
        indices = torch.arange(count, dtype=torch.int32, device=grad.device)
    return values, indices, torch.tensor(bad, device=grad.device)


def compute_dtype(state: Tensor) -> torch.dtype:
    """The dtype that the arithmetic on a state tensor runs in: float64 for float64, else float32."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32
