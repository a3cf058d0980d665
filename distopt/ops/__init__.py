"""Typed face of the native kernels: selection, accumulation and decoding on flat tensors.

The same names work without the native build: `distopt.ops.reference` then does the work, and the first call says so.

All operations take 1-D contiguous tensors. Selection is exact: the k entries of largest magnitude, indices ascending,
on ties the lowest index wins, NaN ranks above everything. Source: Lin et al., *Deep Gradient Compression*, ICLR 2018.
"""

from distopt.ops.device_errors import raise_device_errors
from distopt.ops.dispatch import (
    all_finite,
    decay_step_,
    dgc_sparsify_,
    dgc_sparsify_segments_,
    dgc_take_segments_,
    ef_sparsify_,
    ef_sparsify_segments_,
    ef_take_segments_,
    momentum_step_,
    scale_,
    scatter_add_,
    topk_abs,
    topk_abs_interleaved,
    weighted_sum_,
)
from distopt.ops.native import BuildInfo, SelectionCounts, backend, build_info, selection_counts

__all__ = [
    "BuildInfo",
    "SelectionCounts",
    "all_finite",
    "backend",
    "build_info",
    "decay_step_",
    "dgc_sparsify_",
    "dgc_sparsify_segments_",
    "dgc_take_segments_",
    "ef_sparsify_",
    "ef_sparsify_segments_",
    "ef_take_segments_",
    "momentum_step_",
    "raise_device_errors",
    "scale_",
    "scatter_add_",
    "selection_counts",
    "topk_abs",
    "topk_abs_interleaved",
    "weighted_sum_",
]
