"""Who begins with whom: each rank says what it brings, all find out whether they fit together, and meet."""

import os
import secrets
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from distopt.comm.address import own_address, parse_address
from distopt.comm.agreement import agree, gather_json, raise_together
from distopt.comm.crew.assembly import Assembly
from distopt.errors import CompatibilityError, DistoptError, PeerLostError

_CPU = torch.device("cpu")


def introduce(
    find_facts: Callable[[], dict[str, Any]],
    process_group: dist.ProcessGroup | None,
    interface: str,
    join: str | None,
    *,
    patience_s: float,
    grace_s: float,
) -> Assembly:
    """This rank's assembly, which knows where the others are. Collective, unless it joins or is alone.

    Args:
        find_facts: What all must agree in, as JSON can hold it. What it raises is raised on every rank.
        process_group: The ranks that begin together; None for one that is alone or joins.
        interface: The address where the others find this rank.
        join: "host:port" of a rank of the job, for one that comes later.
        patience_s: See `Assembly`.
        grace_s: See `Assembly`.

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
    timing = {"patience_s": patience_s, "grace_s": grace_s}
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


def address_here(process_group: dist.ProcessGroup | None, join: str | None) -> str:
    """Where the others find this rank's board; where that cannot be told, `greet` finds out whether they do.

    Args:
        process_group: The ranks that begin together; None for one that is alone or joins.
        join: "host:port" of a rank of the job, for one that comes later.

    Raises:
        ConfigError: `join` is no address.
    """
    towards = os.environ.get("MASTER_ADDR") if process_group is not None else None
    if join is not None:
        towards = parse_address(join).host
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
