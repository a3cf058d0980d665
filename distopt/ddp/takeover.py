"""Taking momentum and weight decay over from `torch.optim.SGD`, and giving them back.

Momentum correction needs the momentum before compression. While attached the optimizer's own momentum and weight decay
are 0, so that neither is applied twice; `detach` puts back the settings and, as momentum buffer, the rank average of u.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from distopt.errors import CompatibilityError


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What a parameter group says of its parameters."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


class Takeover:
    """The momentum and weight decay of one SGD optimizer.

    Args:
        optimizer: The user's.
        names: Of the parameters that are synchronised, by id.

    Raises:
        CompatibilityError: Another optimizer, dampening or maximize, or a group that mixes synchronised parameters with
            others.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise CompatibilityError(
                f"momentum correction is defined for torch.optim.SGD, got {type(optimizer).__name__}; use "
                "distopt.TopK(density=...), plain error feedback, which works with every optimizer"
            )
        self._optimizer = optimizer
        self._names = names
        for index, group in self._groups():
            _check_group(index, group, names)
        self.hyperparameters = {
            id(parameter): Hyperparameters(group["momentum"], group["nesterov"], group["weight_decay"])
            for _, group in self._groups()
            for parameter in group["params"]
        }

    def take(self) -> dict[int, Tensor]:
        """Sets the optimizer's momentum and weight decay to 0; returns its momentum buffers by parameter id."""
        buffers = {}
        for _, group in self._groups():
            group.update(momentum=0.0, nesterov=False, weight_decay=0.0)
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if state.get("momentum_buffer") is not None:
                    buffers[id(parameter)] = state.pop("momentum_buffer")
        return buffers

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
        for _, group in self._groups():
            for parameter in group["params"]:
                saved = self.hyperparameters.get(id(parameter))
                if saved is None:  # added to the group while attached
                    continue
                group.update(dataclasses.asdict(saved))
                if id(parameter) in buffers and saved.momentum:
                    self._optimizer.state[parameter]["momentum_buffer"] = buffers[id(parameter)]

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
            if any(id(parameter) in self._names for parameter in group["params"])
        ]


def _check_group(index: int, group: Mapping[str, object], names: Mapping[int, str]) -> None:
    if group["dampening"] != 0:
        raise CompatibilityError(
            f"DGC has no dampening, got dampening={group['dampening']!r} in parameter group {index}; set it to 0"
        )
    if group["maximize"]:
        raise CompatibilityError(
            f"DGC minimises, got maximize=True in parameter group {index}; negate the loss and set it to False"
        )
    parameters = group["params"]
    assert isinstance(parameters, Collection)
    outside = [tuple(p.shape) for p in parameters if id(p) not in names and p.requires_grad]
    if outside and (group["momentum"] or group["weight_decay"]):
        raise CompatibilityError(
            f"parameter group {index} must hold only parameters of the DDP model, got {len(outside)} others (the first "
            f"of shape {outside[0]}); put those into a parameter group of their own, so that they keep their momentum"
        )
