"""Inputs that make selection hard, and what "equal bit for bit" means."""

import torch
from torch import Tensor

from distopt.ops import build_info

# Every native path of this machine; without the native build the operators themselves run on the reference.
PATHS = build_info().available[1:]

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 1000, 16385, 70001)

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, the sign of zero included; NaN equals NaN whatever its payload."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    word = WORDS[a.element_size()]
    return bool(((a.view(word) == b.view(word)) | (a.isnan() & b.isnan())).all())


def _with_specials(n: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(n, generator=generator)
    special = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38])
    at = torch.rand(n, generator=generator) < 0.3
    return torch.where(at, special[torch.randint(8, (n,), generator=generator)], x)


KINDS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "ties": lambda n, g: torch.randint(-3, 4, (n,), generator=g).float(),
    "equal": lambda n, g: torch.full((n,), -2.5),
    "zeros": lambda n, g: torch.zeros(n),
    "denormals": lambda n, g: torch.randn(n, generator=g) * 1e-40,
    "specials": _with_specials,
    "ascending": lambda n, g: torch.arange(n).float() + 1,
    "descending": lambda n, g: -torch.arange(n, 0, -1).float(),
    "spikes": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.01) * 1e6,
    "wide": lambda n, g: torch.randn(n, generator=g) * torch.exp(torch.randn(n, generator=g) * 20),
}


def tensor(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return KINDS[kind](n, torch.Generator().manual_seed(seed)).to(dtype)


def count(n: int, fraction: float) -> int:
    return min(n, round(n * fraction))
