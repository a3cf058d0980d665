"""Formats for the values of sent entries. Every format has a fixed size, known beforehand from the rows' form.

Values come in rows, one for each chunk of a tensor: shape (rows, count), and `runs` says how many rows each tensor has.
`fp32` and `fp16` are plain. `int8` and `2bit` refer to the largest magnitude of all, which is sent in fp32, and to a
magnitude of each row, in 8 bits, a twelfth of a power of two apart:

* `int8`: 255 steps up to the row's largest magnitude.
* `2bit`: a sign and one of two magnitudes, those that are nearest to the row's in the mean square (Lloyd 1982; here
  found by trying every split). The smaller one is a multiple of a sixteenth of the larger.
* `2bit-bins`: the quantiser of SparseLoCo's public code, for comparison: four bins for each tensor, 1.5 standard
  deviations wide, around the mean; each stands for the mean of what fell into it, which is sent in fp32.

The squared error of these two, relative to the values', for the largest 64 of each 4,096 normal, Laplace and Student t3
numbers (tests/compress/test_values.py): `2bit` 0.42%, 1.1% and 6%, `2bit-bins` 1.26%, 3.6% and 35%.

What arrives is the same to the bit on every machine: all that `decode` does is exact or correctly rounded.

Limits: values are finite float32; with `int8` and `2bit` a row below 4e-7 of the largest may arrive as zeros.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.compress.bits import pack, packed_nbytes, unpack
from distopt.compress.rounding import round_to_wire
from distopt.errors import DecodeError

_ANCHOR_NBYTES = 4
_PER_OCTAVE = 12
_ZERO = 255  # the code of a row without magnitude
_RATIOS = 16
_BINS = 4
_BIN_SIGMAS = 6.0 / _BINS  # of the public code: six standard deviations in all
_STEPS = torch.tensor([*(2.0 ** (-code / _PER_OCTAVE) for code in range(_ZERO)), 0.0], dtype=torch.float32)


class ValueFormat(ABC):
    """Contract: `decode(encode(values, runs), runs, count)` is finite, near values, and came in `nbytes` bytes."""

    @abstractmethod
    def nbytes(self, runs: Sequence[int], count: int) -> int:
        """Bytes of rows of so many values, `runs` of them of each tensor."""

    @abstractmethod
    def encode(self, values: Tensor, runs: Sequence[int]) -> Tensor:
        """(rows, count) finite float32, neither of them 0, as (nbytes,) uint8."""

    @abstractmethod
    def decode(self, code: Tensor, runs: Sequence[int], count: int) -> Tensor:
        """(..., rows, count) float32 of (..., nbytes) uint8.

        Raises:
            DecodeError: A magnitude is not a finite number of at least 0.
        """


class Plain(ValueFormat):
    """A floating-point number each; what is too large for 16 bits saturates."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def nbytes(self, runs: Sequence[int], count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return sum(runs) * count * self._dtype.itemsize

    def encode(self, values: Tensor, runs: Sequence[int]) -> Tensor:
        """See `ValueFormat.encode`."""
        return _as_bytes(round_to_wire(values, self._dtype)[0])

    def decode(self, code: Tensor, runs: Sequence[int], count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        values: Tensor = _from_bytes(code, self._dtype).unflatten(-1, (sum(runs), count)).float()
        return values


class Int8(ValueFormat):
    """A byte each, and one for each row."""

    def nbytes(self, runs: Sequence[int], count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return _ANCHOR_NBYTES + sum(runs) * (1 + count)

    def encode(self, values: Tensor, runs: Sequence[int]) -> Tensor:
        """See `ValueFormat.encode`."""
        anchor, relative = _relative(values)
        codes = (
            (relative.abs().amax(1).log2() * -_PER_OCTAVE).floor().clamp(0, _ZERO - 1).to(torch.uint8)
        )  # no clipping
        scales = _STEPS.to(values.device)[codes.long()].double().unsqueeze(1)
        steps = (relative / scales * 127).round().to(torch.int8)
        return torch.cat([_as_bytes(anchor), codes, _as_bytes(steps)])

    def decode(self, code: Tensor, runs: Sequence[int], count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        rows = sum(runs)
        anchor, codes, steps = code.split([_ANCHOR_NBYTES, rows, rows * count], -1)
        scales = _STEPS.to(code.device)[codes.long()] * _anchor(anchor)
        whole: Tensor = _from_bytes(steps, torch.int8).unflatten(-1, (rows, count)).float()
        return whole / 127 * scales.unsqueeze(-1)


class TwoBit(ValueFormat):
    """A sign and a magnitude bit each, and twelve bits for the two magnitudes of each row."""

    def nbytes(self, runs: Sequence[int], count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return sum(self._parts(sum(runs), count))

    def _parts(self, rows: int, count: int) -> list[int]:
        return [_ANCHOR_NBYTES, rows, packed_nbytes(4, rows), packed_nbytes(2, rows * count)]

    def encode(self, values: Tensor, runs: Sequence[int]) -> Tensor:
        """See `ValueFormat.encode`."""
        anchor, relative = _relative(values)
        low, high = _two_means(relative.abs())
        codes = (high.log2() * -_PER_OCTAVE).round().clamp(0, _ZERO).to(torch.uint8)
        scales = _STEPS.to(values.device)[codes.long()].double()
        ratios = (low / scales * _RATIOS).nan_to_num(_RATIOS, posinf=_RATIOS).round().clamp(1, _RATIOS) - 1
        middle = scales * (1 + (ratios + 1) / _RATIOS) / 2
        fields = (relative < 0).to(torch.uint8) | (relative.abs() > middle.unsqueeze(1)).to(torch.uint8) << 1
        return torch.cat([_as_bytes(anchor), codes, pack(ratios.to(torch.uint8), 4), pack(fields.flatten(), 2)])

    def decode(self, code: Tensor, runs: Sequence[int], count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        rows = sum(runs)
        anchor, codes, ratios, fields = code.split(self._parts(rows, count), -1)
        high = (_STEPS.to(code.device)[codes.long()] * _anchor(anchor)).unsqueeze(-1)
        low = high * ((unpack(ratios, 4, rows) + 1).float() / _RATIOS).unsqueeze(-1)
        written = unpack(fields, 2, rows * count).unflatten(-1, (rows, count))
        magnitudes = torch.where((written & 2).bool(), high, low)
        return torch.where((written & 1).bool(), -magnitudes, magnitudes)


class TwoBitBins(ValueFormat):
    """One of four bins each, and the means of the bins of each tensor."""

    def nbytes(self, runs: Sequence[int], count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return sum(self._parts(runs, count))

    def _parts(self, runs: Sequence[int], count: int) -> list[int]:
        return [4 * _BINS * len(runs), packed_nbytes(2, sum(runs) * count)]

    def encode(self, values: Tensor, runs: Sequence[int]) -> Tensor:
        """See `ValueFormat.encode`."""
        codes, levels = [], []
        for rows in values.double().split(list(runs)):
            centred = rows.flatten() - rows.mean()
            deviation = centred.square().sum().div(max(1, rows.numel() - 1)).sqrt()
            bins = (centred / (deviation * _BIN_SIGMAS) + _BINS // 2).nan_to_num(0.0).round().clamp(0, _BINS - 1).long()
            sums = torch.zeros(_BINS, dtype=torch.float64, device=values.device).index_add(0, bins, rows.flatten())
            codes.append(bins.to(torch.uint8))
            levels.append((sums / bins.bincount(minlength=_BINS).clamp(min=1)).float())
        return torch.cat([_as_bytes(torch.cat(levels)), pack(torch.cat(codes), 2)])

    def decode(self, code: Tensor, runs: Sequence[int], count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        level_bytes, fields = code.split(self._parts(runs, count), -1)
        levels = _from_bytes(level_bytes, torch.float32)
        sizes = torch.tensor(runs, device=code.device) * count
        first = torch.arange(0, levels.shape[-1], _BINS, device=code.device).repeat_interleave(sizes)
        bins = unpack(fields, 2, sum(runs) * count).long() + first
        values: Tensor = levels.gather(-1, bins).unflatten(-1, (sum(runs), count))
        return values


def _relative(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude, float32 (1,), and float64 values divided by it; denormals divide exactly enough there."""
    anchor = values.abs().amax().view(1)
    exact = values.double()
    return anchor, exact / anchor.double().clamp(min=torch.finfo(torch.float64).tiny)


def _two_means(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the two levels, float64, whose mean squared distance to it is least; the lower one first.

    In order of magnitude each level has its neighbours: the best of the splits `i | n - i` has the largest
    `sum_1**2 / i + sum_2**2 / (n - i)`. Equal magnitudes have one level, and the lower one is 0.
    """
    count = magnitudes.shape[1]
    sums = torch.nn.functional.pad(magnitudes.sort(1).values.cumsum(1), (1, 0))  # of the i smallest, i = 0 to n
    below = torch.arange(count, dtype=torch.float64, device=magnitudes.device)
    lower, upper = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
    best = (lower.square() / below.clamp(min=1) + upper.square() / (count - below)).argmax(1, keepdim=True)
    low = lower.gather(1, best) / best.clamp(min=1)
    high = upper.gather(1, best) / (count - best)
    return low.squeeze(1), high.squeeze(1)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _from_bytes(code: Tensor, dtype: torch.dtype) -> Tensor:
    copy = code.clone(memory_format=torch.contiguous_format)  # a view must begin on an aligned byte
    return copy.view(dtype)


def _anchor(code: Tensor) -> Tensor:
    anchor = _from_bytes(code, torch.float32)
    if not bool((torch.isfinite(anchor) & (anchor >= 0)).all()):
        raise DecodeError(
            f"the largest magnitude must be a finite number of at least 0, got {anchor.flatten().tolist()}; the "
            "payload was damaged or was encoded with other settings"
        )
    return anchor
