"""Taking momentum and weight decay over from `torch.optim.SGD`, and giving them back.

Momentum correction needs the momentum before compression. While attached the optimizer's own momentum and weight decay
are 0, so that neither is applied twice; `detach` puts back the settings and, as momentum buffer, the rank average of u.
"""

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm import all_reduce_sum
from distopt.ddp.memory import MomentumCorrection
from distopt.ddp.parameters import Hyperparameters, TrackedParameter, flat_like, shaped_like
from distopt.errors import CompatibilityError

# Parameters (by id) whose momentum an attachment has at the moment, by optimizer.
_taken: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[int]] = weakref.WeakKeyDictionary()


class Takeover:
    """The momentum and weight decay of one SGD optimizer.

    Args:
        optimizer: The user's.
        names: Of the parameters that are synchronised, by id.
        stands_for: The parameters that a tensor of the optimizer stands for, by that tensor's id (`Host.stands_for`).

    Raises:
        CompatibilityError: Another optimizer, dampening or maximize, a group that mixes synchronised parameters with
            others, or momentum that another attachment has already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[int, str],
        stands_for: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise CompatibilityError(
                f"momentum correction is defined for torch.optim.SGD, got {type(optimizer).__name__}; use "
                "distopt.TopK(density=...), plain error feedback, which works with every optimizer"
            )
        self._optimizer = optimizer
        self._names = names
        if any(len(parameters) > 1 for parameters in (stands_for or {}).values()):
            raise CompatibilityError(
                "momentum correction needs the momentum of each parameter, got an optimizer with one flat tensor for "
                "several; use distopt.TopK(density=...), which leaves the momentum where it is"
            )
        self._stands_for = {own: id(each[0]) for own, each in (stands_for or {}).items() if each}
        self._empty = {own for own, each in (stands_for or {}).items() if not each}
        for index, group in self._groups():
            self._check_group(index, group)
        self.hyperparameters = {
            self._id(parameter): Hyperparameters(
                float(group["momentum"]), bool(group["nesterov"]), float(group["weight_decay"])
            )
            for _, group in self._groups()
            for parameter in group["params"]
        }
        held = _taken.get(optimizer, set()) & self.hyperparameters.keys()
        if held:
            raise CompatibilityError(
                f"attach needs the optimizer's own momentum and weight decay, got {len(held)} parameters of which "
                "another attachment has them (also one to an earlier DistributedDataParallel of the same module); call "
                "detach() on the first, which gives them back, or make a new optimizer"
            )

    @property
    def is_empty(self) -> bool:
        """Whether there was neither momentum nor weight decay to take."""
        return all(settings.is_empty for settings in self.hyperparameters.values())

    def take(self, tracked: Sequence[TrackedParameter]) -> None:
        """Sets the optimizer's momentum and weight decay to 0 and moves its momentum buffers into u."""
        _taken.setdefault(self._optimizer, set()).update(self.hyperparameters)
        buffers: dict[int, Tensor] = {}
        for _, group in self._groups():
            group.update(momentum=0.0, nesterov=False, weight_decay=0.0)
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if state.get("momentum_buffer") is not None:
                    buffers[self._id(parameter)] = _local(state.pop("momentum_buffer"))
        for entry in tracked:
            buffer = buffers.get(id(entry.parameter))
            if buffer is not None and isinstance(entry.memory, MomentumCorrection):
                flat = flat_like(buffer, entry.parameter, entry.memory.u.dtype)
                entry.memory.u.copy_(flat * entry.memory.momentum if entry.memory.nesterov else flat)

    def check_still_taken(self) -> None:
        """Raises `CompatibilityError` if something has made the optimizer's own momentum or decay non-zero again."""
        for index, group in self._groups():
            for key in ("momentum", "weight_decay"):
                if group[key] != 0:
                    raise CompatibilityError(
                        f"while distopt.DGC is attached the optimizer's {key} must stay 0 (it was taken over), got "
                        f"{group[key]!r} in parameter group {index}; a scheduler that cycles momentum "
                        "(cycle_momentum=False), add_param_group or optimizer.load_state_dict sets it: load the "
                        "optimizer before attach, or detach and attach again"
                    )

    def give_back(self, buffers: Mapping[int, Tensor]) -> None:
        """Puts the settings back, and momentum buffers (by parameter id, in the parameter's shape)."""
        _taken.get(self._optimizer, set()).difference_update(self.hyperparameters)
        for _, group in self._groups():
            for parameter in group["params"]:
                saved = self.hyperparameters.get(self._id(parameter))
                if saved is None:  # added to the group while attached
                    continue
                group.update(dataclasses.asdict(saved))
                buffer = buffers.get(self._id(parameter))
                if buffer is not None and saved.momentum:
                    self._optimizer.state[parameter]["momentum_buffer"] = _like(parameter, buffer.to(parameter.dtype))

    @contextlib.contextmanager
    def given_back(self) -> Iterator[None]:
        """While somebody saves the optimizer: its settings are the user's, so that it can be loaded without us."""
        self.give_back({})
        try:
            yield
        finally:
            self.take([])

    def describe(self) -> str:
        """What was taken, one phrase for all parameters that share it."""
        shared = collections.Counter(self.hyperparameters.values())
        return "; ".join(
            f"momentum {h.momentum:g}{' (Nesterov)' if h.nesterov else ''} and weight decay {h.weight_decay:g} of "
            f"{count} parameters"
            for h, count in shared.items()
        )

    def _groups(self) -> list[tuple[int, dict[str, Any]]]:
        """The groups with synchronised parameters; looked up anew because load_state_dict replaces the groups."""
        return [
            (index, group)
            for index, group in enumerate(self._optimizer.param_groups)
            if any(self._id(parameter) in self._names for parameter in group["params"])
        ]

    def _id(self, parameter: Tensor) -> int:
        """That of the synchronised parameter which the optimizer's own stands for: mostly itself."""
        return self._stands_for.get(id(parameter), id(parameter))

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        if group["dampening"] != 0:
            raise CompatibilityError(
                f"DGC has no dampening, got dampening={group['dampening']!r} in parameter group {index}; set it to 0"
            )
        if not 0 <= group["momentum"] < 1:
            raise CompatibilityError(
                f"DGC needs a momentum in [0, 1), got momentum={group['momentum']!r} in parameter group {index}; "
                "use 0.9"
            )
        if group["maximize"]:
            raise CompatibilityError(
                f"DGC minimises, got maximize=True in parameter group {index}; negate the loss and set it to False"
            )
        known = self._names.keys() | self._empty
        outside = [tuple(p.shape) for p in group["params"] if self._id(p) not in known and p.requires_grad]
        if outside and (group["momentum"] or group["weight_decay"]):
            raise CompatibilityError(
                f"parameter group {index} must hold only parameters of the DDP model, got {len(outside)} others (the "
                f"first of shape {outside[0]}); put those into a parameter group of their own, so that they keep their "
                "momentum"
            )


def _local(buffer: Any) -> Tensor:
    """This rank's part of a sharded buffer (a DTensor), any other as it is."""
    part: Tensor = buffer.to_local() if hasattr(buffer, "to_local") else buffer
    return part


def _like(parameter: Any, buffer: Tensor) -> Tensor:
    """The buffer, sharded as the optimizer's own parameter is."""
    if not hasattr(parameter, "to_local"):
        return buffer
    from torch.distributed.tensor import DTensor  # takes long to import, and is there already

    return DTensor.from_local(
        buffer, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def averaged_momentum(tracked: Sequence[TrackedParameter], group: dist.ProcessGroup) -> dict[int, Tensor]:
    """The momentum buffers that plain SGD would go on with, by parameter id. Collective."""
    buffers = {}
    for entry in tracked:
        if not isinstance(entry.memory, MomentumCorrection):
            continue
        mean = entry.memory.u.to(torch.promote_types(entry.parameter.dtype, torch.float32))
        if entry.memory.holds_back:
            mean = mean / group.size()
            all_reduce_sum(mean, group).wait()
        if entry.decay is not None:
            mean = mean + entry.decay.buffer
        if entry.memory.nesterov:  # our u is m times torch's buffer
            mean = mean / entry.memory.momentum
        buffer = torch.empty_like(entry.parameter, dtype=mean.dtype)
        buffers[id(entry.parameter)] = buffer.copy_(shaped_like(mean, entry.parameter))
    return buffers
