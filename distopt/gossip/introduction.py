"""What all ranks of gossip must agree in before they meet, and whether a model and an optimizer fit its rule."""

from typing import Any

import torch
from torch import nn

from distopt.errors import CompatibilityError
from distopt.gossip.configuration import Gossip
from distopt.gossip.mixing.rule import Mixing
from distopt.replica import check_replica, replica_facts, trained


def facts(
    algorithm: Gossip,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    has_scaler: bool,
    taken: set[int],
    num_ranks: int | None,
) -> dict[str, Any]:
    """What all ranks must agree in.

    Args:
        algorithm: The configuration.
        model: To be averaged.
        optimizer: Of its parameters.
        has_scaler: Whether a `GradScaler` steps the optimizer.
        taken: Parameters that are averaged already, by id.
        num_ranks: How many begin; None for one that joins, whom the others tell.

    Raises:
        CompatibilityError: Model, optimizer and configuration do not fit each other.
        ConfigError: So many ranks cannot have the configuration's topology.
    """
    parameters = trained(model, "gossip")
    check_replica(model, parameters, optimizer, taken, "gossip")
    _check_optimizer(algorithm, optimizer, has_scaler=has_scaler)
    if num_ranks is not None:
        algorithm.surroundings(num_ranks)
    return replica_facts(algorithm, parameters, averaged_buffers(algorithm, model))


def averaged_buffers(algorithm: Gossip, model: nn.Module) -> dict[str, torch.Tensor]:
    """What is averaged beside the parameters, by name."""
    if algorithm.buffers != "average":
        return {}
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _check_optimizer(algorithm: Gossip, optimizer: torch.optim.Optimizer, *, has_scaler: bool) -> None:
    if algorithm.rule.replaces_momentum:
        for each in optimizer.param_groups:
            if type(optimizer) is not torch.optim.SGD or each["momentum"] or each["nesterov"]:
                raise CompatibilityError(
                    f"{algorithm.rule.name} has a memory of its own and needs torch.optim.SGD without "
                    f"momentum, got {type(optimizer).__name__} with momentum {each.get('momentum')}; use "
                    "torch.optim.SGD(momentum=0)"
                )
    if has_scaler and changes_gradients(algorithm) and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise CompatibilityError(
            f"{algorithm.rule.name} needs gradients that are unscaled before the step, got a fused "
            f"{type(optimizer).__name__} with a scaler, which unscales them within it; use fused=False"
        )


def changes_gradients(algorithm: Gossip) -> bool:
    """Whether its rule does something to the gradients before the optimizer's step."""
    return type(algorithm.rule).gradient_ is not Mixing.gradient_
