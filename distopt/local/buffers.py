"""A model's floating buffers, averaged along with its parameters: BatchNorm's statistics, say."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """See the module.

    Args:
        tensors: Of floating dtypes; none where each rank keeps its own.

    Attributes:
        nbytes: Of all of them.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)

    def sent(self) -> Tensor:
        """(nbytes,) uint8 on the CPU, as they are now."""
        return as_bytes(self._tensors)

    def mean(self, rows: Tensor) -> Tensor:
        """The mean of (n, nbytes), as bytes; it does not depend on who computes it.

        Where all agree, it is that to the bit: tables stay as they are, and so does a mask of infinities.
        """
        columns = [self._split(row) for row in rows]
        means = []
        for place, tensor in enumerate(self._tensors):
            wide = torch.promote_types(tensor.dtype, torch.float32)
            first = columns[0][place]
            total, agree = first.to(wide), torch.ones_like(first, dtype=torch.bool)
            for column in columns[1:]:
                total = total + column[place].to(wide)
                agree &= column[place] == first
            means.append(torch.where(agree, first, (total / len(columns)).to(tensor.dtype)))
        return as_bytes(means)

    @torch.no_grad()
    def become_(self, mean: Tensor, sent: Tensor | None = None) -> None:
        """Makes them the mean (nbytes,); where they have gone on since they were sent, moves them by as much.

        They come to lie no further than where the mean is: a variance never becomes negative.
        """
        before = self._split(mean if sent is None else sent)
        for tensor, new, old in zip(self._tensors, self._split(mean), before, strict=True):
            new, old = new.to(tensor.device), old.to(tensor.device)
            if sent is None:
                tensor.copy_(new)
            else:
                least, most = torch.minimum(tensor, new), torch.maximum(tensor, new)
                moved = (tensor + (new - old)).clamp(least, most)
                tensor.copy_(torch.where(new == old, tensor, moved))  # infinities have no difference

    def _split(self, content: Tensor) -> list[Tensor]:
        return from_bytes(content, self._tensors)


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """(nbytes,) uint8 on the CPU: the elements of all of them, one behind the other; a copy."""
    parts = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def from_bytes(content: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `as_bytes` made, as tensors on the CPU in the forms of these."""
    parts = content.split([tensor.nbytes for tensor in like])
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
