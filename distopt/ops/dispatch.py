"""Checks the arguments and hands them to the native kernels where they are built, else to the reference."""

from torch import Tensor

from distopt.ops import reference


def topk_abs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of largest magnitude.

    Args:
        x: float32, bfloat16, float16 or float64, shape (numel,), contiguous.
        k: how many, in [0, numel].

    Returns:
        Values, dtype of x, shape (k,), and their indices, int32, shape (k,), ascending.
    """
    return reference.topk_abs(x, k)


def ef_sparsify_(grad: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Error feedback: `residual += grad`, then take out the k entries of largest magnitude."""
    return reference.ef_sparsify_(grad, residual, k)


def dgc_sparsify_(
    grad: Tensor, u: Tensor, v: Tensor, k: int, *, momentum: float, nesterov: bool = False, masking: bool = True
) -> tuple[Tensor, Tensor]:
    """Momentum correction, selection and masking in one pass (DGC, section 3)."""
    return reference.dgc_sparsify_(grad, u, v, k, momentum, nesterov, masking)


def scatter_add_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """`out[indices[i]] += values[i]`, in order."""
    reference.scatter_add_(out, indices, values)


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor Inf."""
    return reference.all_finite(x)


def backend() -> str:
    """What does the work on CPU tensors."""
    return "reference"
