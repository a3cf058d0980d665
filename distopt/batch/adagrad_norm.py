"""AdaGrad with one step size for all parameters: the optimizer that AdAdaGrad's theory is about.

Sources: Ward, Wu and Bottou, *AdaGrad Stepsizes*, JMLR 2020, algorithm 1; Lau, Liu and Kolar, *AdAdaGrad: Adaptive
Batch Size Schemes for Adaptive Gradient Methods*, 2402.11215, which grows the batch beside it.

Limits: parameters are whole and their gradients dense; no sparse gradients, no shards (FSDP). DGC needs
`torch.optim.SGD`: beside this optimizer, send sparse gradients by `distopt.TopK`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from distopt.errors import CompatibilityError, ConfigError, StateMismatchError

SUM = "sum_of_squares"  # a key of a parameter group: b squared, a tensor of shape ()


class AdaGradNorm(torch.optim.Optimizer):
    """AdaGrad-Norm: `b^2 += |g|^2; x -= lr / b * g`, with the norm over all parameters of a group.

    The sum of squares is kept in its parameter group, in float32 (float64 where a parameter is), also for 16-bit
    parameters. It is the same on all ranks where the gradients are.

    Args:
        params: As for every optimizer of torch: parameters, or groups of them. Each group has a sum of its own.
        lr: eta, in units of the parameters: the first step has about this length if `initial_accumulator_value` is
            small. A converging run is not sensitive to it (Ward et al.). Schedulers may change it.
        weight_decay: L2 penalty, added to the gradient, so that it is in the norm.
        initial_accumulator_value: b^2 before the first step; larger makes the first steps shorter.
        maximize: Whether to go up instead of down.

    Raises:
        ConfigError: A setting breaks its rule.
        CompatibilityError: In `step`: a gradient is sparse, or a shard.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
    ) -> None:
        settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`; its sum begins at its own initial value.

        Raises:
            ConfigError: A setting of the group breaks its rule.
        """
        settings = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay", "initial_accumulator_value"):
            if not 0.0 <= float(settings[name]) < math.inf:
                raise ConfigError(
                    f"{name} must be a finite number of at least 0, got {settings[name]!r}; lr=1.0 and 0.0 for the "
                    "others are the defaults"
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        device = group["params"][0].device
        double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in group["params"])
        dtype = torch.float64 if double else torch.float32
        group[SUM] = torch.tensor(float(group["initial_accumulator_value"]), dtype=dtype, device=device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the settings and the sums of `state_dict`, wherever they were.

        Raises:
            StateMismatchError: It is the state of another optimizer.
            ValueError: It has other groups (from torch).
        """
        if any(SUM not in group for group in state_dict["param_groups"]):
            raise StateMismatchError(
                f"a state of AdaGradNorm must have {SUM!r} in every parameter group, got one without; load what "
                "AdaGradNorm's state_dict() gave"
            )
        devices = [group[SUM].device for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, device in zip(self.param_groups, devices, strict=True):
            group[SUM] = group[SUM].to(device)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves the parameters that have a gradient.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Raises:
            CompatibilityError: A gradient is sparse, or a shard.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                _step(moved, group)
        return loss


def _step(parameters: list[Tensor], group: dict[str, Any]) -> None:
    gradients = [_dense(parameter.grad) for parameter in parameters]
    values = [_real(parameter) for parameter in parameters]
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    if group["weight_decay"]:
        gradients = list(torch._foreach_add(gradients, values, alpha=group["weight_decay"]))
    total: Tensor = group[SUM]
    places = defaultdict(list)
    for index, value in enumerate(values):
        places[value.device, value.dtype].append(index)
    for indices in places.values():
        norms = torch._foreach_norm([gradients[index] for index in indices], 2, total.dtype)
        total += torch.stack(norms).square().sum().to(total.device)
    # where all gradients have been 0 there is nothing to divide, and nowhere to go
    tiny = torch.finfo(total.dtype).tiny
    length = group["lr"] / total.clamp(min=tiny).sqrt()
    for (device, _), indices in places.items():
        steps = torch._foreach_mul([gradients[index] for index in indices], length.to(device))
        torch._foreach_sub_([values[index] for index in indices], steps)


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    if gradient.is_sparse or hasattr(gradient, "full_tensor"):
        kind = "a sparse one" if gradient.is_sparse else "a shard of one (DTensor)"
        raise CompatibilityError(
            f"AdaGradNorm needs whole, dense gradients for its norm, got {kind} of shape {tuple(gradient.shape)}; give "
            "sparse embeddings and sharded parameters to another optimizer, such as torch.optim.Adagrad"
        )
    return _real(gradient)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
