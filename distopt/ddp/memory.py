"""What one rank remembers of one parameter between steps: the part of its gradients that it has not sent yet.

A memory sees flat gradients and knows nothing of ranks, buckets or wires. A step is either sparse (`select_` takes out
what is sent) or dense (`outgoing` is averaged over the ranks, `settle_` takes the average in). The memories of several
parameters can be joined to one that works on all of them in one call.

Law, for every memory: what it has sent and what it holds add up to what was put in. For plain error feedback
`sum(sent) + held == sum(gradients)`; with momentum correction the gradients are replaced by their momenta u.
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from distopt import ops


class Memory(ABC):
    """Base. A subclass names its tensors in `per_rank`; they are what a checkpoint holds for this rank.

    Attributes:
        per_rank: Names of the attributes that hold this rank's tensors (each flat, or None where not needed).
        holds_back: Whether there was a sparse step since the last dense one, on any rank: the same on all.
        owes: Whether v may hold something: after a sparse step or where a dense wire has rounded; the same on all.
        at_leader: Whether the first rank of each node holds what the node's ranks kept, and the others zeros; the same
            on all.
        late: Whether the momentum of a dense step waits for the optimizer's step, since the host clips before it.
        pending: Whether it is waiting.
    """

    per_rank: tuple[str, ...] = ()
    holds_back: bool = False
    owes: bool = False
    at_leader: bool = False
    late: bool = False
    pending: bool = False

    @property
    def num_outgoing(self) -> int:
        """How many tensors the next dense step averages."""
        return 1

    def tensors(self) -> dict[str, Tensor]:
        """This rank's tensors by name, each of shape (numel,)."""
        named = ((name, getattr(self, name)) for name in self.per_rank)
        return {name: tensor for name, tensor in named if tensor is not None}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies that `restore_` takes back: for a step that turns out not to count."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def restore_(self, snapshot: dict[str, Tensor]) -> None:
        """Puts the tensors back to what they were at `snapshot`, each on its own rank."""
        self.at_leader = False
        for name, tensor in self.tensors().items():
            tensor.copy_(snapshot[name])

    def needed(self, *, with_v: bool) -> dict[str, Tensor]:
        """The tensors that a step works on: v only if something is to be kept, or if v owes something."""
        if with_v or self.owes:
            return self.tensors()
        return {name: tensor for name, tensor in self.tensors().items() if name != "v"}

    def kind(self, *, with_v: bool) -> tuple[object, ...]:
        """Memories of equal kind can be joined for such a step: of one class, with the same settings and tensors."""
        tensors = ((name, tensor.dtype, tensor.device) for name, tensor in self.needed(with_v=with_v).items())
        return (type(self), self.num_outgoing, self.owes, *tensors)

    @classmethod
    def joined(cls, memories: Sequence[Self], *, with_v: bool) -> tuple[Self, bool]:
        """One memory over several of equal kind, whose needed tensors become neighbours in the order given.

        Returns:
            The memory (its tensors and theirs share memory from now on), and whether tensors had to be moved.
        """
        whole = copy.copy(memories[0])
        for name in memories[0].tensors():
            setattr(whole, name, None)  # what is not needed is not joined
        moved = False
        for name in memories[0].needed(with_v=with_v):
            parts = [getattr(memory, name) for memory in memories]
            flat = _neighbours(parts)
            if flat is None:
                moved = True
                flat = torch.cat(parts)
                views = flat.split([part.numel() for part in parts])
                for memory, view in zip(memories, views, strict=True):
                    setattr(memory, name, view)
            setattr(whole, name, flat)
        return whole, moved

    @abstractmethod
    def select_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Takes the gradients in and takes out the largest entries of each parameter.

        Args:
            gradient: A flat bucket that holds the gradients of this memory's parameters.
            segments: Where, and how many to take: see `distopt.ops.dgc_sparsify_segments_`.
            count: How many in all.

        Returns:
            Values and their int32 positions in `gradient`, ascending; both of shape (count,).
        """

    @abstractmethod
    def make_room(self) -> None:
        """Makes the tensor for what is held back where a parameter that is sent whole has none."""

    def sit_out_(self) -> None:
        """Notes a sparse step to which this rank contributed nothing while others did."""
        self.holds_back = self.owes = True

    @abstractmethod
    def take_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `select_`, on the CPU, but leaves zeros in `gradient` and takes nothing that is not finite.

        Returns:
            Values and positions, and, int64 and 0-dimensional, the number of the first segment with NaN or Inf, or -1:
            see `distopt.ops.dgc_take_segments_`.
        """

    @abstractmethod
    def give_back_(self, indices: Tensor, error: Tensor) -> None:
        """Takes back what rounding cut off the values just sent; `indices` are positions in this memory."""

    @abstractmethod
    def held(self) -> Tensor:
        """What this rank has not sent yet, shape (numel,): the tensor itself, to take from and to add to."""

    @abstractmethod
    def mask_(self, positions: Tensor) -> None:
        """Forgets the momentum of entries that have been sent, if it has one and does so; `positions` int64."""

    def _keep_only_(self, error: Tensor | None) -> None:
        """Ends a dense step for v: all of it has gone out but for what rounding cut off."""
        held: Tensor | None = getattr(self, "v", None)
        if held is not None and error is not None:
            held.copy_(error)
        elif held is not None and self.owes:
            held.zero_()
        self.owes = error is not None

    @abstractmethod
    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        """What a dense step averages over the ranks; changes nothing yet. The first has the update's meaning."""

    @abstractmethod
    def settle_(self, averaged: list[Tensor], error: Tensor | None) -> Tensor:
        """Ends a dense step: takes the averages of `outgoing` in and returns the update, shape (numel,).

        The averages are used up: the update may take the place of the first. `error` is what rounding cut off this
        rank's own first outgoing tensor, if anything.
        """


class NoMemory(Memory):
    """Plain averaging: everything is sent, nothing is remembered."""

    def make_room(self) -> None:
        """See `Memory.make_room`."""
        raise NotImplementedError("plain averaging holds nothing back")

    def select_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Memory.select_`; never called, because plain averaging has no sparse step."""
        raise NotImplementedError("plain averaging sends everything")

    def take_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Memory.take_`."""
        raise NotImplementedError("plain averaging sends everything")

    def give_back_(self, indices: Tensor, error: Tensor) -> None:
        """See `Memory.give_back_`."""
        raise NotImplementedError("plain averaging sends everything")

    def held(self) -> Tensor:
        """See `Memory.held`."""
        raise NotImplementedError("plain averaging holds nothing back")

    def mask_(self, positions: Tensor) -> None:
        """See `Memory.mask_`."""

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        """See `Memory.outgoing`."""
        return [gradient]

    def settle_(self, averaged: list[Tensor], error: Tensor | None) -> Tensor:
        """See `Memory.settle_`."""
        return averaged[0]


class ErrorFeedback(Memory):
    """The residual e of plain error feedback: `e += g`, send the largest of e, keep the rest.

    Args:
        numel: Entries of the parameter.
        dtype: Of the residual: float32, or bfloat16 to halve its memory.
        device: Where the parameter lives.
        residual: False leaves the residual out, for a parameter that is always sent whole and unrounded.
    """

    per_rank = ("v",)

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, *, residual: bool = True) -> None:
        self._empty = functools.partial(torch.zeros, numel, dtype=dtype, device=device)
        self.v = self._empty() if residual else None

    def make_room(self) -> None:
        """See `Memory.make_room`."""
        self.v = self._empty() if self.v is None else self.v

    def select_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Memory.select_`."""
        assert self.v is not None
        self.holds_back = self.owes = True
        return ops.ef_sparsify_segments_(gradient, self.v, segments, count)

    def take_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Memory.take_`."""
        assert self.v is not None
        self.holds_back = self.owes = True
        return ops.ef_take_segments_(gradient, self.v, segments, count)

    def give_back_(self, indices: Tensor, error: Tensor) -> None:
        """See `Memory.give_back_`."""
        assert self.v is not None
        self.v[indices.long()] = error.to(self.v.dtype)  # what was sent has just been zeroed

    def held(self) -> Tensor:
        """See `Memory.held`."""
        assert self.v is not None
        return self.v

    def mask_(self, positions: Tensor) -> None:
        """See `Memory.mask_`; there is no momentum."""

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        """See `Memory.outgoing`."""
        return [gradient + self.v if self.owes and self.v is not None else gradient]

    def settle_(self, averaged: list[Tensor], error: Tensor | None) -> Tensor:
        """See `Memory.settle_`."""
        self._keep_only_(error)
        self.holds_back = False
        return averaged[0]


class MomentumCorrection(Memory):
    """Velocity u and accumulated velocity v of Deep Gradient Compression (Lin et al., ICLR 2018, sections 3.1 and 3.3).

    Sparse step: `u = m u + g; v += u` (Nesterov: `u = m (u + g); v += u + g`), send the largest of v, zero v and (with
    factor masking) u where sent. Dense step: u is the momentum of the averaged gradient and v stays empty, which is
    momentum SGD, up to rounding. The first dense step after sparse ones averages u and sends all of v, so nothing is
    lost.

    Args:
        numel: Entries of the parameter.
        dtype: Of u and v: float32, or bfloat16 to halve their memory.
        device: Where the parameter lives.
        momentum: m, in [0, 1).
        nesterov: Which form.
        masking: Whether sent entries also lose their velocity.
        residual: False leaves v out, for a parameter that is always sent whole and unrounded.
    """

    per_rank = ("u", "v")

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        momentum: float,
        nesterov: bool,
        masking: bool,
        residual: bool = True,
    ) -> None:
        self.momentum = momentum
        self.nesterov = nesterov
        self.masking = masking
        self.u = torch.zeros(numel, dtype=dtype, device=device)
        self.v = torch.zeros(numel, dtype=dtype, device=device) if residual else None

    def kind(self, *, with_v: bool) -> tuple[object, ...]:
        """See `Memory.kind`."""
        return (*super().kind(with_v=with_v), self.momentum, self.nesterov, self.masking)

    @property
    def num_outgoing(self) -> int:
        """See `Memory.num_outgoing`. After sparse steps u differs between the ranks and is averaged too."""
        return 1 + self.holds_back

    def make_room(self) -> None:
        """See `Memory.make_room`."""
        self.v = torch.zeros_like(self.u) if self.v is None else self.v

    def select_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Memory.select_`."""
        assert self.v is not None
        self.holds_back = self.owes = True
        self.pending = False
        return ops.dgc_sparsify_segments_(
            gradient,
            self.u,
            self.v,
            segments,
            count,
            momentum=self.momentum,
            nesterov=self.nesterov,
            masking=self.masking,
        )

    def take_(self, gradient: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Memory.take_`."""
        assert self.v is not None
        self.holds_back = self.owes = True
        self.pending = False
        return ops.dgc_take_segments_(
            gradient,
            self.u,
            self.v,
            segments,
            count,
            momentum=self.momentum,
            nesterov=self.nesterov,
            masking=self.masking,
        )

    def give_back_(self, indices: Tensor, error: Tensor) -> None:
        """See `Memory.give_back_`."""
        assert self.v is not None
        self.v[indices.long()] = error.to(self.v.dtype)

    def held(self) -> Tensor:
        """See `Memory.held`."""
        assert self.v is not None
        return self.v

    def mask_(self, positions: Tensor) -> None:
        """See `Memory.mask_`."""
        if self.masking:
            self.u[positions] = 0

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        """See `Memory.outgoing`."""
        if not self.holds_back:
            return [gradient + self.v if self.owes and self.v is not None else gradient]
        assert self.v is not None
        if self.nesterov:
            velocity = (self.u + gradient) * self.momentum
            return [self.v + velocity + gradient, velocity]
        velocity = self.u * self.momentum + gradient
        return [self.v + velocity, velocity]

    def settle_(self, averaged: list[Tensor], error: Tensor | None) -> Tensor:
        """See `Memory.settle_`."""
        self._keep_only_(error)
        self.pending = self.late and not self.holds_back
        if self.holds_back:
            self.u.copy_(averaged[1])
            self.holds_back = False
            return averaged[0]
        if self.pending:
            return averaged[0]
        if averaged[0].dtype == self.u.dtype and self.u.dtype in (torch.float32, torch.float64):
            ops.momentum_step_(averaged[0], self.u, momentum=self.momentum, nesterov=self.nesterov)
            return averaged[0]
        gradient = averaged[0].to(self.u.dtype)
        if self.nesterov:
            self.u.add_(gradient).mul_(self.momentum)
            return self.u + gradient
        return self.u.mul_(self.momentum).add_(gradient)


def _neighbours(parts: Sequence[Tensor]) -> Tensor | None:
    """One flat tensor over flat parts that lie one behind the other in one storage, or None if they do not."""
    end = parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr() or part.storage_offset() != end:
            return None
        end += part.numel()
    return parts[0].as_strided((end - parts[0].storage_offset(),), (1,))
