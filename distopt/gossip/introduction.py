"""Who begins with whom: each rank says what it brings, all find out whether they fit together, and meet."""

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.comm import agree, gather_json, own_address, raise_together
from distopt.errors import CompatibilityError, DistoptError, PeerLostError
from distopt.gossip.configuration import Gossip
from distopt.gossip.flat import check_averaged, trained
from distopt.gossip.mixing.rule import Mixing
from distopt.gossip.ranks.crew import Assembly
from distopt.version import __version__

_CPU = torch.device("cpu")


def introduce(
    algorithm: Gossip,
    find_facts: Callable[[], dict[str, Any]],
    process_group: dist.ProcessGroup | None,
    interface: str,
    join: str | None,
) -> Assembly:
    """This rank's assembly, which knows where the others are. Collective, unless it joins or is alone.

    Args:
        algorithm: Its `peer_timeout` and `grace` are those of the assembly.
        find_facts: What all must agree in; see `facts`. What it raises is raised on every rank.
        process_group: The ranks that begin together; None for one that is alone or joins.
        interface: The address where the others find this rank.
        join: "host:port" of a rank of the job, for one that comes later.

    Raises:
        CompatibilityError: The ranks do not fit together.
        PeerLostError: Some cannot reach each other.
    """
    problem: DistoptError | None = None
    own: dict[str, Any] | None = None
    try:
        own = find_facts()
    except DistoptError as error:
        problem = error
    timing = {"patience_s": algorithm.peer_timeout, "grace_s": algorithm.grace}
    if join is not None:
        if problem is not None:
            raise problem
        return Assembly.to_join(join, interface, facts=own, **timing)
    job = secrets.token_hex(8)
    if process_group is None:
        if problem is not None:
            raise problem
        return Assembly(0, interface, facts=own, job=job, **timing)
    agree(own, problem, process_group, _CPU)
    job = gather_json(job, process_group, _CPU)[0]
    assembly = None
    try:
        assembly = Assembly(process_group.rank(), interface, facts=own, job=job, **timing)
    except DistoptError as error:
        problem = error
    try:
        raise_together(problem, process_group, _CPU, what="cannot attach")
        assert assembly is not None
        told = gather_json(list(assembly.address), process_group, _CPU)
        assembly.begin({rank: (str(host), int(port)) for rank, (host, port) in enumerate(told)})
        try:
            assembly.greet()
        except PeerLostError as error:
            problem = error
        raise_together(problem, process_group, _CPU, what="cannot attach")
    except BaseException:
        if assembly is not None:
            assembly.close(farewell=False)
        raise
    return assembly


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
    if any(isinstance(each, DistributedDataParallel) for each in model.modules()):
        raise CompatibilityError(
            "gossip takes the place of DDP's own averaging, got a DistributedDataParallel model; pass the module "
            "that it wraps (model.module), and do not wrap it"
        )
    parameters = trained(model)
    check_averaged(parameters)
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
    _check_optimizer(algorithm, optimizer, has_scaler=has_scaler)
    if num_ranks is not None:
        algorithm.surroundings(num_ranks)
    shapes = [(name, tuple(p.shape), str(p.dtype), tuple(p.stride())) for name, p in parameters.items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    return {
        "distopt version": __version__,
        "configuration": algorithm.to_dict(),
        "model": f"{len(parameters)} parameters, digest {digest}",
    }


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


def address_here(towards: str | None) -> str:
    """Where the others find this rank's board; where that cannot be told, `greet` finds out whether they do."""
    try:
        return own_address(towards)
    except OSError:
        return "127.0.0.1"


def group_to_begin(given: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that begin together: those given, or all; None in a process that belongs to no job.

    Raises:
        CompatibilityError: They cannot exchange tensors on the CPU.
    """
    group = given if given is not None or not dist.is_initialized() else dist.group.WORLD
    if group is not None:
        try:
            group._get_backend(_CPU)
        except RuntimeError as error:
            raise CompatibilityError(
                f"the ranks must have a process group for tensors on the CPU, got {dist.get_backend(group)!r}; use "
                'init_process_group("cpu:gloo,cuda:nccl"), or process_group=dist.new_group(backend="gloo")'
            ) from error
    return group
