"""The mathematics of one fragment of the model, on flat tensors: without ranks and clocks.

With R ranks, `Delta_r = theta - local_r`, and SparseLoCo (arXiv:2508.15706, section 3):

1. `e_r = beta e_r + Delta_r`; `D_r` is what the k largest entries of each chunk of `e_r` become on the wire.
2. `e_r -= D_r`: what was not sent, and what rounding cut off, waits.
3. `theta -= alpha / R sum_r D_r`; with an outer momentum the step is that of `torch.optim.SGD` with this as gradient.

So with beta = 1 and without momentum nothing is lost: `sum of all Delta == R * sum of all updates / alpha + sum of all
e`. DiLoCo (arXiv:2311.08105, algorithm 1) sends Delta itself.

A rank that has gone on meanwhile keeps what it learned: `local = theta_new + (local_now - local_when_sent)`, and that
is part of its next Delta.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from distopt import ops
from distopt.compress import ChunkPayload, Chunks
from distopt.errors import ConfigError, NonFiniteGradientError, StateMismatchError
from distopt.local.configuration import DiLoCo, LocalSteps, SparseLoCo

_ENTRIES_AT_ONCE = 1 << 22  # decoded at once, of several ranks: bounds the memory


def partition(sizes: Sequence[int], fragments: int) -> list[range]:
    """Which tensors are in each fragment: neighbours, with about equally many elements.

    Args:
        sizes: Elements of each tensor of the model, in its order.
        fragments: How many parts.

    Raises:
        ConfigError: There are more fragments than tensors.
    """
    if fragments > len(sizes):
        raise ConfigError(
            f"fragments must be at most the number of tensors that are trained ({len(sizes)}), got {fragments}; use "
            "fewer"
        )
    total, parts, first, done = sum(sizes), [], 0, 0
    for fragment in range(fragments):
        last = len(sizes) - (fragments - fragment - 1)  # each of the others gets one at least
        stop, done = first + 1, done + sizes[first]
        while stop < last and done + sizes[stop] / 2 <= total * (fragment + 1) / fragments:
            done, stop = done + sizes[stop], stop + 1
        parts.append(range(first, stop if fragment < fragments - 1 else len(sizes)))
        first = stop
    return parts


class Fragment:
    """One fragment on one rank.

    Args:
        algorithm: The configuration.
        sizes: Elements of each tensor in it.
        start: (d,) float32, the model that all ranks begin with; copied.

    Attributes:
        theta: (d,) float32, the model that all share.
        residual: (d,) float32, what this rank has not sent yet; None for DiLoCo, which sends all.
        momentum: (d,) float32, of the outer step; None without.
        reduces: Whether contributions may be added up by an all-reduce; else all are needed.
        nbytes: Of a contribution.
    """

    def __init__(self, algorithm: LocalSteps, sizes: Sequence[int], start: Tensor) -> None:
        self._algorithm, self._sizes = algorithm, tuple(sizes)
        self.theta = start.detach().to(torch.float32, copy=True).contiguous()
        self._payload: ChunkPayload | None = None
        self._chunks: Chunks | None = None
        self.residual: Tensor | None = None
        if isinstance(algorithm, SparseLoCo):
            self._chunks = Chunks(sizes, algorithm.chunk, algorithm.k, start.device)
            self._payload = ChunkPayload(self._chunks, algorithm.values, algorithm.indices)
            self.residual = torch.zeros_like(self.theta)
        elif not isinstance(algorithm, DiLoCo):
            raise ConfigError(f"a fragment needs SparseLoCo or DiLoCo, got {algorithm!r}; choose one of them")
        self.momentum = torch.zeros_like(self.theta) if algorithm.outer_momentum else None
        self.reduces = self._payload is None
        self.nbytes = 4 * self.theta.numel() if self._payload is None else self._payload.nbytes

    def twin(self) -> Self:
        """The same fragment on another rank of this process: what is replicated is shared, so one takes for all."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.residual = None if self.residual is None else torch.zeros_like(self.residual)
        return made

    def first_nonfinite(self, local: Tensor) -> int | None:
        """Number of the first tensor with NaN or Inf in this rank's model (d,), or None."""
        if ops.all_finite(local):
            return None
        bad = (i for i, part in enumerate(local.split(self._sizes)) if not bool(torch.isfinite(part).all()))
        return next(bad, None)

    @torch.no_grad()
    def contribute_(self, local: Tensor) -> Tensor:
        """What this rank sends, and takes out of its residual.

        Args:
            local: (d,) float32, its model.

        Returns:
            (d,) float32 where `reduces`, else (nbytes,) uint8.

        Raises:
            NonFiniteGradientError: NaN or Inf; nothing has changed.
        """
        delta = self.theta - local
        if self.residual is not None:
            assert isinstance(self._algorithm, SparseLoCo)
            delta += self.residual * self._algorithm.decay
        if not ops.all_finite(delta):
            bad = next(i for i, part in enumerate(delta.split(self._sizes)) if not bool(torch.isfinite(part).all()))
            raise NonFiniteGradientError(
                f"pseudo-gradients must be finite, got NaN or Inf in tensor {bad} of a fragment of {len(self._sizes)}; "
                "nothing was sent and no residual was changed. Lower the learning rate, or clip gradients, and go on "
                "from a checkpoint"
            )
        if self.residual is None:
            return delta
        assert self._chunks is not None
        assert self._payload is not None
        residual = torch.zeros_like(self.residual)
        values, positions = ops.ef_sparsify_segments_(delta, residual, self._chunks.segments, self._chunks.count)
        payload, arriving = self._payload.encode(values, positions)
        residual[positions.long()] = values - arriving  # what was sent has just been zeroed
        self.residual.copy_(residual)
        return payload

    @torch.no_grad()
    def take_(self, gathered: Tensor, num_ranks: int, *, outer_lr: float | None = None) -> None:
        """Moves theta by the outer step: equal bits on all ranks.

        Args:
            gathered: The sum of the contributions where `reduces`, (d,); else all of them, (num_ranks, nbytes), in the
                order of the ranks.
            num_ranks: How many have contributed.
            outer_lr: Instead of the configuration's.

        Raises:
            DecodeError: A contribution is not one of this fragment; nothing has changed.
            NonFiniteGradientError: The sum holds NaN or Inf; nothing has changed.
        """
        step = gathered / num_ranks if self._payload is None else self._mean(gathered)
        if not ops.all_finite(step):
            raise NonFiniteGradientError(
                f"the mean of {num_ranks} pseudo-gradients must be finite, got NaN or Inf; the model was not changed. "
                "Lower the learning rate, or clip gradients, and go on from a checkpoint"
            )
        if self.momentum is not None:
            self.momentum.mul_(self._algorithm.outer_momentum).add_(step)
            looked_ahead = self.momentum * self._algorithm.outer_momentum
            step = step + looked_ahead if self._algorithm.nesterov else self.momentum
        lr = self._algorithm.outer_lr if outer_lr is None else outer_lr
        self.theta.sub_(step * lr)  # not add_(alpha=): on some machines that rounds once, on others twice

    def _mean(self, rows: Tensor) -> Tensor:
        assert self._payload is not None
        assert isinstance(self._algorithm, SparseLoCo)
        total = torch.zeros_like(self.theta)
        senders = torch.zeros_like(self.theta) if self._algorithm.average == "senders" else None
        assert self._chunks is not None
        for some in rows.split(max(1, _ENTRIES_AT_ONCE // max(1, self._chunks.count))):
            for values, positions in zip(*self._payload.decode(some), strict=True):
                ops.scatter_add_(total, positions, values)
                if senders is not None:
                    ops.scatter_add_(senders, positions, torch.ones_like(values))
        return total / (len(rows) if senders is None else senders.clamp_(min=1))

    def restart_(self, theta: Tensor, momentum: Tensor | None) -> None:
        """Takes the others' model and outer momentum, both (d,), with an empty residual: after a round was missed."""
        self.theta.copy_(theta)
        if self.momentum is not None and momentum is not None:
            self.momentum.copy_(momentum)
        if self.residual is not None:
            self.residual.zero_()

    def state_dict(self) -> dict[str, Any]:
        """`theta`, `residual` and `momentum` of this rank, shared; None where there is none."""
        return {"theta": self.theta, "residual": self.residual, "momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another was.

        Raises:
            StateMismatchError: It had other tensors, or another configuration; nothing has changed.
        """
        own = self.state_dict()
        for name, tensor in own.items():
            saved = state.get(name)
            if _form(saved) != _form(tensor):
                raise StateMismatchError(
                    f"{name} of a fragment must be {_form(tensor)}, got {_form(saved)}; load it into the configuration "
                    "and model that it was saved from"
                )
        for name, tensor in own.items():
            if tensor is not None:
                tensor.copy_(state[name])


def _form(tensor: object) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
