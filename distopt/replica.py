"""A model of which every rank has a whole replica: which parameters it trains, and whether they can be averaged."""

import hashlib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from distopt.config import Algorithm
from distopt.errors import CompatibilityError
from distopt.version import __version__


def trained(model: nn.Module, family: str) -> dict[str, nn.Parameter]:
    """The parameters that a rank trains, by name, a tied one under its first.

    Args:
        model: Any.
        family: Who asks, for the messages.

    Raises:
        CompatibilityError: They are not whole, or have no memory yet.
    """
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules()):
        raise CompatibilityError(
            f"parameters must be whole on every rank, got a FullyShardedDataParallel model; use {family} between "
            "replicas that are not sharded"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise CompatibilityError(
                f"parameters must have memory, got {name!r} that is {'lazy' if is_lazy(parameter) else 'on meta'}; run "
                "a batch through the model, or load it, before you attach"
            )
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_replica(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    taken: Collection[int],
    family: str,
) -> None:
    """Whether the parameters can be averaged, and by this optimizer's steps.

    Args:
        model: Of this rank.
        parameters: That it trains.
        optimizer: That is to hold some of them.
        taken: Parameters that other attachments average, by id.
        family: Who asks, for the messages.

    Raises:
        CompatibilityError: They cannot.
    """
    if any(isinstance(each, DistributedDataParallel) for each in model.modules()):
        raise CompatibilityError(
            f"the averaging of {family} takes the place of DDP's, got a DistributedDataParallel model; pass the module "
            "that it wraps (model.module), and do not wrap it"
        )
    for name, parameter in parameters.items():
        if not parameter.is_floating_point() or parameter.layout != torch.strided:
            raise CompatibilityError(
                f"parameters must be dense and of a floating dtype, got {name!r} of {parameter.dtype}, "
                f"{parameter.layout}; freeze it, or keep real and imaginary parts apart"
            )
        if hasattr(parameter, "device_mesh"):
            raise CompatibilityError(
                f"parameters must be whole on every rank, got {name!r} as a DTensor; use {family} between replicas "
                "that are not sharded"
            )
    if found := [name for name, p in parameters.items() if id(p) in taken]:
        raise CompatibilityError(
            f"a model must be attached once, got {found[0]!r} that another attachment averages; detach that first"
        )
    known = {id(p) for each in getattr(optimizer, "param_groups", ()) for p in each["params"]}
    if not parameters or not any(id(p) in known for p in parameters.values()):
        raise CompatibilityError(
            f"the optimizer must hold parameters of the model, got none of its {len(parameters)}; make it from "
            "model.parameters(), of this very model"
        )


def replica_facts(
    algorithm: Algorithm,
    parameters: Mapping[str, nn.Parameter],
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """What all ranks must agree in, as JSON can hold it.

    Args:
        algorithm: The configuration.
        parameters: That are trained.
        beside: What else is exchanged, or given to ranks that come.
    """
    shapes = [(name, tuple(p.shape), str(p.dtype), tuple(p.stride())) for name, p in parameters.items()]
    shapes += [(name, tuple(each.shape), str(each.dtype), ()) for name, each in beside.items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    return {
        "distopt version": __version__,
        "configuration": algorithm.to_dict(),
        "model": f"{len(parameters)} parameters, digest {digest}",
    }


class StillAll:
    """What is trained later and was not at attach would be left out of all averages, in silence: it is refused.

    Args:
        model: As it is attached.
        optimizer: Likewise.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._given = {id(p) for each in optimizer.param_groups for p in each["params"]}
        self._frozen = {id(p) for p in model.parameters() if not p.requires_grad}

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step.

        Raises:
            CompatibilityError: The optimizer has another parameter, or one that was frozen is trained.
        """
        for each in optimizer.param_groups:
            for number, parameter in enumerate(each["params"]):
                if id(parameter) not in self._given or (id(parameter) in self._frozen and parameter.requires_grad):
                    raise CompatibilityError(
                        "the optimizer must have the parameters that it had at attach, and frozen ones must stay so, "
                        f"got another at place {number} of a group, of shape {tuple(parameter.shape)}; detach, and "
                        "attach again on every rank"
                    )
