"""Formats for the values of sent entries. Every format has a fixed size, known from (rows, count) alone.

Values come in rows, one for each chunk of a tensor, shape (rows, count). `fp32` and `fp16` are plain; the others refer
to the largest magnitude of all, which is sent in fp32, and to a magnitude of each row, in 8 bits, a twelfth of a power
of two apart:

* `int8`: 255 steps up to the row's largest magnitude.
* `2bit`: a sign and one of two magnitudes, those that are nearest to the row's in the mean square (Lloyd 1982; here
  found by trying every split). The smaller one is a multiple of a sixteenth of the larger.
* `2bit-bins`: the bins of SparseLoCo's public code, four of 1.5 standard deviations around the mean, each standing for
  the mean of what fell into it. For comparison: it needs the same two bits and loses about three times as much.

What arrives is the same to the bit on every machine: all that `decode` does is exact or correctly rounded.

Limits: values are finite float32; a magnitude below 4e-7 of the largest of all rows may arrive as zero.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distopt.compress.bits import pack, packed_nbytes, unpack
from distopt.compress.rounding import round_to_wire
from distopt.errors import DecodeError

_PER_OCTAVE = 12
_ZERO = 255  # the code of a row without magnitude
_RATIOS = 16
_BIN_SIGMAS = 6.0 / 4  # of the public code: six standard deviations in four bins
_STEPS = torch.tensor([*(2.0 ** (-code / _PER_OCTAVE) for code in range(_ZERO)), 0.0], dtype=torch.float32)


class ValueFormat(ABC):
    """Contract: `decode(encode(values), *values.shape)` is near values, finite, and came in `nbytes` bytes."""

    @abstractmethod
    def nbytes(self, rows: int, count: int) -> int:
        """Bytes of so many rows of so many values."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """(rows, count) finite float32, neither of them 0, as (nbytes,) uint8."""

    @abstractmethod
    def decode(self, code: Tensor, rows: int, count: int) -> Tensor:
        """(rows, count) float32 of (nbytes,) uint8. Raises `DecodeError` if it holds what `encode` never makes."""


class Plain(ValueFormat):
    """A floating-point number each; what is too large for 16 bits saturates."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def nbytes(self, rows: int, count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return rows * count * self._dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        """See `ValueFormat.encode`."""
        return round_to_wire(values, self._dtype)[0].contiguous().view(torch.uint8).view(-1)

    def decode(self, code: Tensor, rows: int, count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        return code.clone().view(self._dtype).view(rows, count).float()


class Int8(ValueFormat):
    """A byte each, and one for each row."""

    def nbytes(self, rows: int, count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return 4 + rows + rows * count

    def encode(self, values: Tensor) -> Tensor:
        """See `ValueFormat.encode`."""
        anchor, relative = _relative(values)
        codes = (
            (relative.abs().amax(1).log2() * -_PER_OCTAVE).floor().clamp(0, _ZERO - 1).to(torch.uint8)
        )  # no clipping
        scales = _STEPS.to(values.device)[codes.long()].double().unsqueeze(1)
        steps = (relative / scales * 127).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([_as_bytes(anchor), codes, steps.view(torch.uint8).flatten()])

    def decode(self, code: Tensor, rows: int, count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        anchor, codes, steps = code.split([4, rows, rows * count])
        scales = _STEPS.to(code.device)[codes.long()] * _anchor(anchor)
        decoded: Tensor = steps.view(torch.int8).view(rows, count).float() / 127 * scales.unsqueeze(1)
        return decoded


class TwoBit(ValueFormat):
    """A sign and a magnitude bit each, and twelve bits for the two magnitudes of each row."""

    def nbytes(self, rows: int, count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return 4 + rows + packed_nbytes(4, rows) + packed_nbytes(2, rows * count)

    def encode(self, values: Tensor) -> Tensor:
        """See `ValueFormat.encode`."""
        anchor, relative = _relative(values)
        low, high = _two_means(relative.abs())
        codes = (high.log2() * -_PER_OCTAVE).round().clamp(0, _ZERO).to(torch.uint8)
        scales = _STEPS.to(values.device)[codes.long()].double()
        ratios = (low / scales * _RATIOS).nan_to_num(_RATIOS, posinf=_RATIOS).round().clamp(1, _RATIOS) - 1
        middle = scales * (1 + (ratios + 1) / _RATIOS) / 2
        fields = (relative < 0).to(torch.uint8) | (relative.abs() > middle.unsqueeze(1)).to(torch.uint8) << 1
        return torch.cat([_as_bytes(anchor), codes, pack(ratios.to(torch.uint8), 4), pack(fields.flatten(), 2)])

    def decode(self, code: Tensor, rows: int, count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        anchor, codes, ratios, fields = code.split([4, rows, packed_nbytes(4, rows), packed_nbytes(2, rows * count)])
        high = (_STEPS.to(code.device)[codes.long()] * _anchor(anchor)).unsqueeze(1)
        low = high * ((unpack(ratios, 4, rows) + 1).float() / _RATIOS).unsqueeze(1)
        written = unpack(fields, 2, rows * count).view(rows, count)
        magnitudes = torch.where((written & 2).bool(), high, low)
        return torch.where((written & 1).bool(), -magnitudes, magnitudes)


class TwoBitBins(ValueFormat):
    """One of four bins each, and the means of the bins of each row as `Int8` writes them."""

    _levels = Int8()

    def nbytes(self, rows: int, count: int) -> int:
        """See `ValueFormat.nbytes`."""
        return self._levels.nbytes(rows, 4) + packed_nbytes(2, rows * count)

    def encode(self, values: Tensor) -> Tensor:
        """See `ValueFormat.encode`."""
        _, exact = _relative(values)
        centred = exact - exact.mean(1, keepdim=True)
        deviation = centred.square().sum(1, keepdim=True).div(max(1, values.shape[1] - 1)).sqrt()
        bins = (centred / (deviation * _BIN_SIGMAS) + 2).nan_to_num(2.0).round().clamp(0, 3).long()
        counts = torch.zeros((len(values), 4), dtype=torch.float64, device=values.device)
        sums = counts.scatter_add(1, bins, values.double())
        counts = counts.scatter_add(1, bins, torch.ones_like(exact))
        levels = (sums / counts.clamp(min=1)).float()
        return torch.cat([self._levels.encode(levels), pack(bins.to(torch.uint8).flatten(), 2)])

    def decode(self, code: Tensor, rows: int, count: int) -> Tensor:
        """See `ValueFormat.decode`."""
        levels, fields = code.split([self._levels.nbytes(rows, 4), packed_nbytes(2, rows * count)])
        bins = unpack(fields, 2, rows * count).view(rows, count)
        return self._levels.decode(levels, rows, 4).gather(1, bins.long())


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


def _as_bytes(anchor: Tensor) -> Tensor:
    return anchor.contiguous().view(torch.uint8)


def _anchor(code: Tensor) -> Tensor:
    anchor = code.clone().view(torch.float32)
    if not bool(torch.isfinite(anchor) & (anchor >= 0)):
        raise DecodeError(
            f"the largest magnitude must be a finite number of at least 0, got {float(anchor)}; the payload was "
            "damaged or was encoded with other settings"
        )
    return anchor
