"""An attachment's state as plain dictionaries, grouped by fate.

*Per rank*: memories (u, v), under the rank's number, so that a checkpointer which merges equal keys keeps them apart.
*Replicated*: decay momentum, what was taken over, the step; the same on every rank. *Never saved*: statistics, plans,
workspaces.
Tensors are saved in their parameter's shape, so that a model in another memory format can take them.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm import all_reduce_sum, gather_json
from distopt.ddp.memory import MomentumCorrection
from distopt.ddp.parameters import TrackedParameter, shaped_like
from distopt.errors import StateMismatchError

_log = logging.getLogger("distopt")

FORMAT = 1
PER_RANK = "ranks"
REPLICATED = "replicated"


def collect(tracked: Sequence[TrackedParameter], rank: int) -> dict[str, Any]:
    """The state of the tracked parameters, with copies of nothing: save it before the next step."""
    memories = {}
    decays = {}
    for entry in tracked:
        memories[entry.name] = {
            name: shaped_like(tensor, entry.parameter) for name, tensor in entry.memory.tensors().items()
        }
        if entry.decay is not None:
            decays[entry.name] = shaped_like(entry.decay.buffer, entry.parameter)
    return {
        PER_RANK: {str(rank): memories},
        REPLICATED: {
            "decay": decays,
            "taken_over": {entry.name: dataclasses.asdict(entry.hyperparameters) for entry in tracked},
            "holds_back": {entry.name: entry.memory.holds_back for entry in tracked},
            "owes": {entry.name: entry.memory.owes for entry in tracked},
            "tensors": {entry.name: " ".join(entry.memory.tensors()) for entry in tracked},
        },
    }


def check(state: Mapping[str, Any], tracked: Sequence[TrackedParameter], algorithm: str) -> None:
    """Raises `StateMismatchError` unless the state is of this algorithm, these parameters and these settings.

    Densities, the wire and the warm-up may differ: what was held back is sent whatever they are.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatchError(
            f"a state must have format {FORMAT}, got {found!r}; load what state_dict() of an attachment returned"
        )
    if state["algorithm"] != algorithm:
        raise StateMismatchError(
            f"the state must be of algorithm {algorithm!r}, got {state['algorithm']!r}; attach that one"
        )
    names = [entry.name for entry in tracked]
    for memories in state[PER_RANK].values():
        missing = [name for name in names if name not in memories]
        unexpected = [name for name in memories if name not in names]
        if missing or unexpected:
            raise StateMismatchError(
                f"the state must hold the parameters of this model, got {unexpected[:3] or 'nothing'} it lacks and "
                f"{missing[:3] or 'nothing'} missing; load the state of this model"
            )
    for entry in tracked:
        _check_taken_over(entry, state[REPLICATED])
        for rank, memories in state[PER_RANK].items():
            _check_tensors(entry, memories[entry.name], rank, state[REPLICATED]["tensors"][entry.name].split())


def restore_own(state: Mapping[str, Any], tracked: Sequence[TrackedParameter], rank: int) -> None:
    """Takes back what this rank saved. The state must have passed `check`.

    Raises:
        StateMismatchError: The state is another rank's.
    """
    if str(rank) not in state[PER_RANK]:
        raise StateMismatchError(
            f"rank {rank} must load its own state, got that of rank {', '.join(state[PER_RANK])}; save and load one "
            "state per rank (distopt.checkpoint does)"
        )
    for entry in tracked:
        _restore_replicated(entry, state[REPLICATED])
        _restore_sum(entry, [state[PER_RANK][str(rank)][entry.name]])


def redistribute(
    state: Mapping[str, Any], tracked: Sequence[TrackedParameter], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Spreads the state of another number of ranks over these. Collective.

    Every rank brings the states of some old ranks (also of none); together they must cover all. What was held back is
    summed, so that its sum over the ranks is kept; the velocity u is averaged, so that momentum keeps its size.

    Raises:
        StateMismatchError: The state of an old rank was brought by nobody.
    """
    old_size = int(state["world_size"])
    brought = gather_json(sorted(state[PER_RANK]), group, device)
    owner: dict[str, int] = {}
    for rank, ranks in enumerate(brought):
        for old in ranks:
            owner.setdefault(old, rank)  # if several ranks bring the same state the first counts
    missing = [old for old in range(old_size) if str(old) not in owner]
    if missing:
        raise StateMismatchError(
            f"resuming {old_size} ranks on {group.size()} needs the state of every old rank, got none of "
            f"{', '.join(map(str, missing))}; use distopt.checkpoint.load, which reads them all"
        )
    own = [memories for old, memories in state[PER_RANK].items() if owner[old] == group.rank()]
    for entry in tracked:
        _restore_replicated(entry, state[REPLICATED])
        sums = _restore_sum(entry, [memories[entry.name] for memories in own])
        if isinstance(entry.memory, MomentumCorrection):
            mean = sums["u"].div_(old_size)
            all_reduce_sum(mean, group).wait()
            entry.memory.u.copy_(mean)
    if group.rank() == 0:
        _log.warning(
            "resumed %d ranks on %d: held-back gradients are redistributed, their sum is kept", old_size, group.size()
        )


def _restore_replicated(entry: TrackedParameter, replicated: Mapping[str, Any]) -> None:
    if entry.decay is not None:
        buffer = shaped_like(entry.decay.buffer, entry.parameter)
        if entry.name in replicated["decay"]:
            buffer.copy_(replicated["decay"][entry.name])
        else:
            buffer.zero_()  # saved without weight decay: its momentum starts anew
    entry.memory.holds_back = bool(replicated["holds_back"][entry.name])
    entry.memory.owes = bool(replicated["owes"][entry.name])
    entry.memory.at_leader = False
    if "v" in replicated["tensors"][entry.name].split():  # also where a parameter sent sparse is now sent whole
        entry.memory.make_room()


def _restore_sum(entry: TrackedParameter, saved: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sets the memory to the sum of these, in no less than float32; returns the sums, flat, by name."""
    sums = {}
    for name, tensor in entry.memory.tensors().items():
        found = [memory[name] for memory in saved if name in memory]
        total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        shaped = shaped_like(total, entry.parameter)
        if found:
            shaped.copy_(found[0])  # the bits of it, the sign of zero included
        for other in found[1:]:
            shaped.add_(other.to(total))
        tensor.copy_(total)
        sums[name] = total
    return sums


def _check_taken_over(entry: TrackedParameter, replicated: Mapping[str, Any]) -> None:
    saved, own = replicated["taken_over"][entry.name], dataclasses.asdict(entry.hyperparameters)
    for key in ("momentum", "nesterov"):
        if saved[key] != own[key]:
            raise StateMismatchError(
                f"{key} of {entry.name!r} must be the saved {saved[key]!r}, got {own[key]!r}; attach before "
                f"optimizer.load_state_dict (a saved optimizer's momentum is 0 while DGC has it), with the same {key}"
            )
    if entry.name in replicated["decay"] and entry.decay is None:
        raise StateMismatchError(
            f"weight decay of {entry.name!r} must have a momentum, as the saved {saved['weight_decay']!r} has, got "
            f"{own['weight_decay']!r} without; attach before optimizer.load_state_dict (a saved optimizer's weight "
            "decay is 0 while DGC has it), with weight decay in the optimizer and the same weight_decay= in DGC"
        )


def _check_tensors(entry: TrackedParameter, saved: Mapping[str, Tensor], rank: str, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in saved]
    if missing:
        raise StateMismatchError(
            f"the state of {entry.name!r} must hold {' and '.join(names)}, got none of {' and '.join(missing)} for "
            f"rank {rank}; torch.distributed.checkpoint.load reads only what the attachment has already: use "
            "distopt.checkpoint.load_distributed"
        )
    for name, tensor in saved.items():
        if tuple(tensor.shape) != tuple(entry.parameter.shape):
            raise StateMismatchError(
                f"{name} of {entry.name!r} must have shape {tuple(entry.parameter.shape)}, got {tuple(tensor.shape)} "
                f"in the state of rank {rank}; load the state of this model"
            )
