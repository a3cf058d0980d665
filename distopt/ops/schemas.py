"""Defines the operators `torch.ops.distopt.*`: the one place that holds their schemas.

Each has a fake kernel (shapes and dtypes, for torch.compile) and the reference as its kernel on every device. The
native library only registers kernels for the CPU on top: the operators exist, and compile, built or not.
"""

import torch
from torch import Tensor

from distopt.ops import reference

LIBRARY = torch.library.Library("distopt", "DEF")

LIBRARY.define("topk_abs(Tensor x, int k) -> (Tensor, Tensor)")
LIBRARY.define("ef_sparsify_(Tensor grad, Tensor(a!) residual, int k) -> (Tensor, Tensor)")
LIBRARY.define(
    "dgc_sparsify_(Tensor grad, Tensor(a!) u, Tensor(b!) v, int k, *, "
    "float momentum, bool nesterov=False, bool masking=True) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "ef_sparsify_segments_(Tensor grad, Tensor(a!) residual, Tensor segments, int count) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "dgc_sparsify_segments_(Tensor grad, Tensor(a!) u, Tensor(b!) v, Tensor segments, int count, *, "
    "float momentum, bool nesterov=False, bool masking=True) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "ef_take_segments_(Tensor(a!) grad, Tensor(b!) residual, Tensor segments, int count) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "dgc_take_segments_(Tensor(a!) grad, Tensor(b!) u, Tensor(c!) v, Tensor segments, int count, *, "
    "float momentum, bool nesterov=False, bool masking=True) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("topk_abs_interleaved(Tensor x, int k, int num_owners) -> (Tensor, Tensor)")
LIBRARY.define("scatter_add_(Tensor(a!) out, Tensor indices, Tensor values) -> ()")
LIBRARY.define("all_finite(Tensor x) -> Tensor")  # one bool: an operator that returns a Python bool cannot be traced
LIBRARY.define("scale_(Tensor(a!) x, float factor) -> Tensor")
LIBRARY.define("momentum_step_(Tensor(a!) grad, Tensor(b!) u, *, float momentum, bool nesterov=False) -> ()")
LIBRARY.define(
    "decay_step_(Tensor(a!) update, int[] starts, Tensor(b!)[] buffers, Tensor[] parameters, *, "
    "float rate, float momentum, bool nesterov=False) -> ()"
)
LIBRARY.define("weighted_sum_(Tensor(a!) out, Tensor[] rows, float[] weights) -> ()")
LIBRARY.define("_device_errors(Tensor like) -> Tensor")  # CUDA kernels only, see distopt.ops.device_errors
LIBRARY.define("_cpu_path(int path) -> int")  # native only, as the next, see distopt.ops.native
LIBRARY.define("_selection_count(int counter) -> int")


def _selected(like: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return like.new_empty(k, dtype=dtype), like.new_empty(k, dtype=torch.int32)


def _fake_topk_abs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _selected(x, k, x.dtype)


def _fake_ef_sparsify(grad: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _selected(residual, k, reference.compute_dtype(residual))


def _fake_dgc_sparsify(
    grad: Tensor, u: Tensor, v: Tensor, k: int, *, momentum: float, nesterov: bool = False, masking: bool = True
) -> tuple[Tensor, Tensor]:
    return _selected(v, k, reference.compute_dtype(v))


def _fake_ef_sparsify_segments(grad: Tensor, residual: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return _selected(residual, count, reference.compute_dtype(residual))


def _fake_dgc_sparsify_segments(
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
    return _selected(v, count, reference.compute_dtype(v))


def _fake_ef_take_segments(
    grad: Tensor, residual: Tensor, segments: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    return *_selected(residual, count, reference.compute_dtype(residual)), grad.new_empty((), dtype=torch.int64)


def _fake_dgc_take_segments(
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
    return *_selected(v, count, reference.compute_dtype(v)), grad.new_empty((), dtype=torch.int64)


def _fake_topk_abs_interleaved(x: Tensor, k: int, num_owners: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((num_owners, k)), x.new_empty((num_owners, k), dtype=torch.int32)


def _fake_scatter_add(out: Tensor, indices: Tensor, values: Tensor) -> None:
    return None


def _fake_all_finite(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


def _all_finite(x: Tensor) -> Tensor:
    return torch.tensor(reference.all_finite(x), device=x.device)


def _fake_scale(x: Tensor, factor: float) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


def _scale(x: Tensor, factor: float) -> Tensor:
    return torch.tensor(reference.scale_(x, factor), device=x.device)


def _fake_momentum_step(grad: Tensor, u: Tensor, *, momentum: float, nesterov: bool = False) -> None:
    return None


def _fake_decay_step(
    update: Tensor,
    starts: list[int],
    buffers: list[Tensor],
    parameters: list[Tensor],
    *,
    rate: float,
    momentum: float,
    nesterov: bool = False,
) -> None:
    return None


def _fake_weighted_sum(out: Tensor, rows: list[Tensor], weights: list[float]) -> None:
    return None


for _name, _kernel, _fake in (
    ("topk_abs", reference.topk_abs, _fake_topk_abs),
    ("ef_sparsify_", reference.ef_sparsify_, _fake_ef_sparsify),
    ("dgc_sparsify_", reference.dgc_sparsify_, _fake_dgc_sparsify),
    ("ef_sparsify_segments_", reference.ef_sparsify_segments_, _fake_ef_sparsify_segments),
    ("dgc_sparsify_segments_", reference.dgc_sparsify_segments_, _fake_dgc_sparsify_segments),
    ("ef_take_segments_", reference.ef_take_segments_, _fake_ef_take_segments),
    ("dgc_take_segments_", reference.dgc_take_segments_, _fake_dgc_take_segments),
    ("topk_abs_interleaved", reference.topk_abs_interleaved, _fake_topk_abs_interleaved),
    ("scatter_add_", reference.scatter_add_, _fake_scatter_add),
    ("all_finite", _all_finite, _fake_all_finite),
    ("scale_", _scale, _fake_scale),
    ("momentum_step_", reference.momentum_step_, _fake_momentum_step),
    ("decay_step_", reference.decay_step_, _fake_decay_step),
    ("weighted_sum_", reference.weighted_sum_, _fake_weighted_sum),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"distopt::{_name}", _fake, lib=LIBRARY)
