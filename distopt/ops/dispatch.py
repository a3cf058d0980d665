"""Checks the arguments and hands them to the kernels: the functions that users of `distopt.ops` call.

Limits: float64 gradients and states always run on the reference, which is as fast as torch is. Nothing here is
differentiable. Under torch.compile overlapping memory is not detected, and float64 segments break the graph.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from distopt.errors import ConfigError
from distopt.ops import checks, native, reference

Selection = tuple[Tensor, Tensor]
Taken = tuple[Tensor, Tensor, Tensor]

_topk_abs: Callable[[Tensor, int], Selection] = torch.ops.distopt.topk_abs.default
_ef_sparsify_: Callable[[Tensor, Tensor, int], Selection] = torch.ops.distopt.ef_sparsify_.default
_dgc_sparsify_: Callable[..., Selection] = torch.ops.distopt.dgc_sparsify_.default
_ef_sparsify_segments_: Callable[[Tensor, Tensor, Tensor, int], Selection] = (
    torch.ops.distopt.ef_sparsify_segments_.default
)
_dgc_sparsify_segments_: Callable[..., Selection] = torch.ops.distopt.dgc_sparsify_segments_.default
_ef_take_segments_: Callable[[Tensor, Tensor, Tensor, int], Taken] = torch.ops.distopt.ef_take_segments_.default
_dgc_take_segments_: Callable[..., Taken] = torch.ops.distopt.dgc_take_segments_.default
_topk_abs_interleaved: Callable[[Tensor, int, int], Selection] = torch.ops.distopt.topk_abs_interleaved.default
_scatter_add_: Callable[[Tensor, Tensor, Tensor], None] = torch.ops.distopt.scatter_add_.default
_all_finite: Callable[[Tensor], Tensor] = torch.ops.distopt.all_finite.default
_scale_: Callable[[Tensor, float], Tensor] = torch.ops.distopt.scale_.default
_momentum_step_: Callable[..., None] = torch.ops.distopt.momentum_step_.default
_decay_step_: Callable[..., None] = torch.ops.distopt.decay_step_.default
_weighted_sum_: Callable[[Tensor, Sequence[Tensor], Sequence[float]], None] = torch.ops.distopt.weighted_sum_.default


def topk_abs(x: Tensor, k: int) -> Selection:
    """The k entries of largest magnitude, exactly; on ties the lowest index wins, NaN ranks largest.

    Args:
        x: float32, bfloat16, float16 or float64, shape (numel,), contiguous.
        k: how many, in [0, numel].

    Returns:
        Values, dtype of x, shape (k,), and their indices, int32, shape (k,), ascending.

    Raises:
        ConfigError: an argument breaks a rule above.
    """
    checks.flat("x", x, checks.FLOATS)
    checks.count(k, x.numel())
    if not is_compiling() and not native.silent:
        native.announce(x.device)
    if x.dtype is torch.float64:
        return reference.topk_abs(x, k)
    return _topk_abs(x, k)


def ef_sparsify_(grad: Tensor, residual: Tensor, k: int) -> Selection:
    """Error feedback: `residual += grad`, then take the k entries of largest magnitude out of it.

    Args:
        grad: float32, bfloat16, float16 or float64, shape (numel,), contiguous; only read.
        residual: float32, bfloat16 or float64, same shape and device, contiguous; updated. Arithmetic is in float32
            (float64 for float64); a bfloat16 residual rounds on store, and the rounded value is selected and sent.
        k: how many, in [0, numel].

    Returns:
        Values, float32 (float64 for a float64 residual), shape (k,), and indices, int32, shape (k,), ascending.

    Raises:
        ConfigError: an argument breaks a rule above, or grad and residual share memory.

    Source: Stich et al., *Sparsified SGD with Memory*, 2018.
    """
    checks.flat("grad", grad, checks.FLOATS)
    checks.flat("residual", residual, checks.STATES)
    checks.same_size("residual", residual, "grad", grad)
    checks.count(k, grad.numel())
    if not is_compiling():
        checks.apart("residual", residual, "grad", grad)
        if not native.silent:
            native.announce(grad.device)
    if grad.dtype is torch.float64 or residual.dtype is torch.float64:
        return reference.ef_sparsify_(grad, residual, k)
    return _ef_sparsify_(grad, residual, k)


def dgc_sparsify_(
    grad: Tensor, u: Tensor, v: Tensor, k: int, *, momentum: float, nesterov: bool = False, masking: bool = True
) -> Selection:
    """Momentum correction, exact selection and masking in one pass.

    `u = m u + g; v += u` (Nesterov: `u = m (u + g); v += u + g`), then the k entries of largest `|v|` are taken out of
    v and, with masking, set to zero in u.

    Args:
        grad: float32, bfloat16, float16 or float64, shape (numel,), contiguous; only read.
        u: momentum, float32, bfloat16 or float64, same shape and device, contiguous; updated.
        v: velocity, dtype of u; updated. 16-bit states: as the residual of `ef_sparsify_`.
        k: how many, in [0, numel].
        momentum: m, in [0, 1].
        nesterov: look ahead.
        masking: momentum factor masking.

    Returns:
        Values, float32 (float64 for float64 states), shape (k,), and indices, int32, shape (k,), ascending.

    Raises:
        ConfigError: an argument breaks a rule above, or two of the tensors share memory.

    Source: Lin et al., *Deep Gradient Compression*, ICLR 2018, sections 3.1 to 3.3.
    """
    checks.flat("grad", grad, checks.FLOATS)
    checks.flat("u", u, checks.STATES)
    checks.flat("v", v, (u.dtype,))
    checks.same_size("u", u, "grad", grad)
    checks.same_size("v", v, "grad", grad)
    checks.count(k, grad.numel())
    checks.momentum_range(momentum)
    if not is_compiling():
        checks.apart("u", u, "grad", grad)
        checks.apart("v", v, "grad", grad)
        checks.apart("v", v, "u", u)
        if not native.silent:
            native.announce(grad.device)
    if grad.dtype is torch.float64 or u.dtype is torch.float64:
        return reference.dgc_sparsify_(grad, u, v, k, momentum=momentum, nesterov=nesterov, masking=masking)
    return _dgc_sparsify_(grad, u, v, k, momentum=momentum, nesterov=nesterov, masking=masking)


def ef_sparsify_segments_(grad: Tensor, residual: Tensor, segments: Tensor, count: int) -> Selection:
    """`ef_sparsify_` on many tensors of one flat bucket in one call.

    Args:
        grad: The bucket, float32, bfloat16, float16 or float64, shape (numel,), contiguous; only read, and only inside
            the segments.
        residual: float32, bfloat16 or float64, contiguous; the segments' residuals one behind the other; updated.
        segments: int64, shape (num_segments, 3), on the device of grad; rows (start in grad, numel, k), ascending and
            apart; k in [0, numel].
        count: The sum of all k.

    Returns:
        Values, float32 (float64 for a float64 residual), shape (count,), and their positions in grad, int32, shape
        (count,), ascending.

    Raises:
        ConfigError: an argument breaks a rule above. (A table on a GPU is not read here, that would wait for it: see
            `raise_device_errors`. What a call with such a table returns is undefined.)
    """
    _check_ef_segments(grad, residual, segments, count)
    if grad.dtype is torch.float64 or residual.dtype is torch.float64:
        return reference.ef_sparsify_segments_(grad, residual, segments, count)
    try:
        return _ef_sparsify_segments_(grad, residual, segments, count)
    except RuntimeError:
        checks.segment_rows(segments, count, grad.numel(), residual.numel())
        raise


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
) -> Selection:
    """`dgc_sparsify_` on many tensors of one flat bucket in one call.

    Args:
        grad: The bucket, float32, bfloat16, float16 or float64, shape (numel,), contiguous; only read, and only inside
            the segments.
        u: momentum, float32, bfloat16 or float64, contiguous; the segments' momenta one behind the other; updated.
        v: velocity, as u; updated.
        segments: int64, shape (num_segments, 3), on the device of grad; rows (start in grad, numel, k), ascending and
            apart; k in [0, numel].
        count: The sum of all k.
        momentum: m, in [0, 1].
        nesterov: look ahead.
        masking: momentum factor masking.

    Returns:
        Values, float32 (float64 for float64 states), shape (count,), and their positions in grad, int32, shape
        (count,), ascending.

    Raises:
        ConfigError: an argument breaks a rule above. (A table on a GPU is not read here, that would wait for it: see
            `raise_device_errors`. What a call with such a table returns is undefined.)
    """
    _check_dgc_segments(grad, u, v, segments, count, momentum)
    if grad.dtype is torch.float64 or u.dtype is torch.float64:
        return reference.dgc_sparsify_segments_(
            grad, u, v, segments, count, momentum=momentum, nesterov=nesterov, masking=masking
        )
    try:
        return _dgc_sparsify_segments_(
            grad, u, v, segments, count, momentum=momentum, nesterov=nesterov, masking=masking
        )
    except RuntimeError:
        checks.segment_rows(segments, count, grad.numel(), u.numel())
        raise


def ef_take_segments_(grad: Tensor, residual: Tensor, segments: Tensor, count: int) -> Taken:
    """`ef_sparsify_segments_` that also checks the gradient and leaves zeros in its place, in the same pass.

    For a bucket that is to become the update: there is no pass of its own for `all_finite` and none for `zero_`. CUDA
    tensors run on the reference here, which waits for the device: use the three operations there.

    Args:
        grad: As in `ef_sparsify_segments_`, and updated: zero inside the segments afterwards, untouched outside.
        residual: As in `ef_sparsify_segments_`.
        segments: As there.
        count: As there.

    Returns:
        Values and indices, as there, and the row of the first segment that holds NaN or Inf in grad, int64, shape ();
        -1 if none does, and then values, indices and residual are bit for bit those of `ef_sparsify_segments_`.

        If one does, nothing is selected: values are zeros and indices 0 to count - 1, which adds nothing. No NaN or
        Inf of grad is in residual, and nothing was taken out of it; grad still holds NaN or Inf in that segment.
        Which finite entries have been added to the residual, and what else grad holds inside the segments, is not
        defined. (Finite gradients may make a residual overflow: that is not checked.)

    Raises:
        ConfigError: an argument breaks a rule of `ef_sparsify_segments_`.
    """
    _check_ef_segments(grad, residual, segments, count)
    if grad.dtype is torch.float64 or residual.dtype is torch.float64:
        return reference.ef_take_segments_(grad, residual, segments, count)
    try:
        return _ef_take_segments_(grad, residual, segments, count)
    except RuntimeError:
        checks.segment_rows(segments, count, grad.numel(), residual.numel())
        raise


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
) -> Taken:
    """`dgc_sparsify_segments_` that also checks the gradient and leaves zeros in its place, in the same pass.

    For a bucket that is to become the update: there is no pass of its own for `all_finite` and none for `zero_`. CUDA
    tensors run on the reference here, which waits for the device: use the three operations there.

    Args:
        grad: As in `dgc_sparsify_segments_`, and updated: zero inside the segments afterwards, untouched outside.
        u: As in `dgc_sparsify_segments_`.
        v: As there.
        segments: As there.
        count: As there.
        momentum: As there.
        nesterov: As there.
        masking: As there.

    Returns:
        Values and indices, as there, and the row of the first segment that holds NaN or Inf in grad, int64, shape ();
        -1 if none does, and then values, indices, u and v are bit for bit those of `dgc_sparsify_segments_`.

        If one does, nothing is selected: values are zeros and indices 0 to count - 1, which adds nothing. No NaN or
        Inf of grad is in u or v, and nothing was taken out of v (u may have been masked where entries of other
        segments would have been); grad still holds NaN or Inf in that segment. Which finite entries have been
        accumulated, and what else grad holds inside the segments, is not defined. (Finite gradients may make u and v
        overflow: that is not checked.)

    Raises:
        ConfigError: an argument breaks a rule of `dgc_sparsify_segments_`.
    """
    _check_dgc_segments(grad, u, v, segments, count, momentum)
    if grad.dtype is torch.float64 or u.dtype is torch.float64:
        return reference.dgc_take_segments_(
            grad, u, v, segments, count, momentum=momentum, nesterov=nesterov, masking=masking
        )
    try:
        return _dgc_take_segments_(grad, u, v, segments, count, momentum=momentum, nesterov=nesterov, masking=masking)
    except RuntimeError:
        checks.segment_rows(segments, count, grad.numel(), u.numel())
        raise


def topk_abs_interleaved(x: Tensor, k: int, num_owners: int) -> Selection:
    """The k entries of largest magnitude of each residue class `x[owner::num_owners]`, exactly; ties as `topk_abs`.

    Args:
        x: float32, bfloat16, float16 or float64, shape (numel,), contiguous.
        k: how many per owner, in [0, numel // num_owners].
        num_owners: N, at least 1.

    Returns:
        Values, dtype of x, shape (num_owners, k), and indices, int32, shape (num_owners, k): row j holds positions in
        `x[j::num_owners]`, ascending, so that entry i is position `i * num_owners + j` of x.

    Raises:
        ConfigError: an argument breaks a rule above.
    """
    checks.flat("x", x, checks.FLOATS)
    if not isinstance(num_owners, int) or num_owners < 1:
        raise ConfigError(f"num_owners must be an int of at least 1, got {num_owners!r}; use the number of ranks")
    checks.count(k, x.numel() // num_owners)
    if not is_compiling() and not native.silent:
        native.announce(x.device)
    if x.dtype is torch.float64:
        return reference.topk_abs_interleaved(x, k, num_owners)
    return _topk_abs_interleaved(x, k, num_owners)


def scatter_add_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """`out[indices[i]] += values[i]` for i = 0, 1, ... in this order, so that all ranks get equal bits.

    Args:
        out: float32 or float64, shape (numel,), contiguous; updated.
        indices: int32, shape (count,), contiguous, each in [0, numel); may repeat, but not on a CUDA device.
        values: float32, bfloat16, float16, or float64 if out is; shape (count,), contiguous.

    Raises:
        ConfigError: an argument breaks a rule above.
        DecodeError: an index is out of range (a RuntimeError under torch.compile). Nothing was written. The CUDA kernel
            does not wait to be asked: it writes nothing for such an index, and `raise_device_errors` tells.
    """
    checks.flat("out", out, checks.SUMS)
    checks.flat("indices", indices, checks.INDICES)
    checks.flat("values", values, checks.FLOATS if out.dtype is torch.float64 else checks.FLOATS[:3])
    checks.same_size("values", values, "indices", indices)
    checks.same_device("indices", indices, "out", out)
    if is_compiling():
        _scatter_add_(out, indices, values)
        return
    checks.apart("values", values, "out", out)
    if not native.silent:
        native.announce(out.device)
    try:
        _scatter_add_(out, indices, values)
    except RuntimeError:
        checks.index_range(indices, out.numel())
        raise


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor Inf: one read pass that stops at the first block that does.

    Under torch.compile(fullgraph=True) set `torch._dynamo.config.capture_scalar_outputs`, as for `Tensor.item`.

    Args:
        x: float32, bfloat16, float16 or float64, shape (numel,), contiguous.

    Raises:
        ConfigError: x breaks a rule above.
    """
    checks.flat("x", x, checks.FLOATS, indexed=False)
    if not is_compiling() and not native.silent:
        native.announce(x.device)
    return bool(_all_finite(x).item())


def scale_(x: Tensor, factor: float) -> bool:
    """`x *= factor`, and whether x held neither NaN nor Inf, in one pass.

    Args:
        x: float32, bfloat16, float16 or float64, shape (numel,), contiguous; updated.
        factor: By what, finite.

    Returns:
        Whether x was finite before. If not, it still is not, and which of its entries have been scaled is not defined.

    Raises:
        ConfigError: an argument breaks a rule above.
    """
    checks.flat("x", x, checks.FLOATS, indexed=False)
    if not math.isfinite(factor):
        raise ConfigError(f"factor must be finite, got {factor}; 1.0 leaves x as it is")
    if not is_compiling() and not native.silent:
        native.announce(x.device)
    if x.dtype is not torch.float32:
        return reference.scale_(x, factor)
    return bool(_scale_(x, factor).item())


def momentum_step_(grad: Tensor, u: Tensor, *, momentum: float, nesterov: bool = False) -> None:
    """The momentum step of SGD, which leaves its update in place of the gradient, in one pass.

    `u = m u + g; g = u` (Nesterov: `u = m (u + g); g = u + g`).

    Args:
        grad: float32 or float64, shape (numel,), contiguous; becomes the update.
        u: momentum, as grad; updated.
        momentum: m, in [0, 1].
        nesterov: look ahead.

    Raises:
        ConfigError: an argument breaks a rule above, or grad and u share memory.
    """
    checks.flat("grad", grad, checks.SUMS, indexed=False)
    checks.flat("u", u, (grad.dtype,), indexed=False)
    checks.same_size("u", u, "grad", grad)
    checks.momentum_range(momentum)
    if not is_compiling():
        checks.apart("u", u, "grad", grad)
        if not native.silent:
            native.announce(grad.device)
    if grad.dtype is torch.float64:
        reference.momentum_step_(grad, u, momentum=momentum, nesterov=nesterov)
    else:
        _momentum_step_(grad, u, momentum=momentum, nesterov=nesterov)


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
    """Weight decay with a momentum d of its own, for many parameters p in one call and one pass over each.

    `d = m d + wd p; update += d` (Nesterov: `d = m (d + wd p); update += d; update += wd p`). In float64, and on other
    devices than the CPU, torch's operations do it, a few for all parameters.

    Args:
        update: A flat bucket, float32 or float64, shape (numel,), contiguous; updated at the parameters' places.
        starts: Where each parameter begins in it.
        buffers: d of each, of the dtype of update, flat, contiguous; updated.
        parameters: Floating point, not wider than update, any shape, dense in memory; only read. Entries correspond to
            those of update and d in the order in which they lie in memory.
        rate: wd, finite.
        momentum: m, in [0, 1].
        nesterov: look ahead.

    Raises:
        ConfigError: an argument breaks a rule above. (That buffers are not part of update is not checked.)
    """
    checks.flat("update", update, checks.SUMS, indexed=False)
    checks.momentum_range(momentum)
    if not math.isfinite(rate):
        raise ConfigError(f"rate must be finite, got {rate}; 0.0 is no decay")
    if not is_compiling() and not native.silent:
        native.announce(update.device)
    with torch.no_grad():
        if update.dtype is torch.float64:
            reference.decay_step_(update, starts, buffers, parameters, rate=rate, momentum=momentum, nesterov=nesterov)
            return
        try:
            _decay_step_(update, starts, buffers, parameters, rate=rate, momentum=momentum, nesterov=nesterov)
        except RuntimeError:  # checking first would cost more than small parameters do
            checks.parameter_places(update, starts, buffers, parameters)
            raise


def weighted_sum_(out: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """`out = weights[0] rows[0] + weights[1] rows[1] + ...`, added up in this order, in one pass over memory.

    Each product and each sum is rounded to the dtype of out: the same bits whatever computes them. In float64, and on
    other devices than the CPU, torch's operations do it.

    Args:
        out: float32 or float64, shape (numel,), contiguous; overwritten.
        rows: At least one tensor of the size and device of out, contiguous, all of one dtype: float32, bfloat16 or
            float16, or float64 if out is.
        weights: One number for each.

    Raises:
        ConfigError: an argument breaks a rule above, or a row shares memory with out.
    """
    checks.flat("out", out, checks.SUMS, indexed=False)
    checks.rows(out, rows, weights)
    if not is_compiling() and not native.silent:
        native.announce(out.device)
    if out.dtype is torch.float64:
        reference.weighted_sum_(out, rows, weights)
    else:
        _weighted_sum_(out, rows, weights)


def _check_ef_segments(grad: Tensor, residual: Tensor, segments: Tensor, count: int) -> None:
    checks.flat("grad", grad, checks.FLOATS)
    checks.flat("residual", residual, checks.STATES)
    checks.same_device("residual", residual, "grad", grad)
    checks.segment_table(segments, count, grad)
    if not is_compiling():
        checks.apart("residual", residual, "grad", grad)
        if not native.silent:
            native.announce(grad.device)


def _check_dgc_segments(grad: Tensor, u: Tensor, v: Tensor, segments: Tensor, count: int, momentum: float) -> None:
    checks.flat("grad", grad, checks.FLOATS)
    checks.flat("u", u, checks.STATES)
    checks.flat("v", v, (u.dtype,))
    checks.same_device("u", u, "grad", grad)
    checks.same_size("v", v, "u", u)
    checks.segment_table(segments, count, grad)
    checks.momentum_range(momentum)
    if not is_compiling():
        checks.apart("u", u, "grad", grad)
        checks.apart("v", v, "grad", grad)
        checks.apart("v", v, "u", u)
        if not native.silent:
            native.announce(grad.device)
