"""An attachment's state as plain dictionaries, grouped by fate.

*Per rank*: memories (u, v), under the rank's number, so that a checkpointer which merges equal keys keeps them apart.
*Replicated*: decay momentum and the step, the same on every rank. *Never saved*: statistics, plans, workspaces.
Tensors are saved in their parameter's shape, so that a model in another memory format can take them.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

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
            "momentum": {entry.name: getattr(entry.memory, "momentum", 0.0) for entry in tracked},
            "per_rank_velocity": {entry.name: entry.memory.holds_back for entry in tracked},
        },
    }


def check(state: Mapping[str, Any], tracked: Sequence[TrackedParameter], algorithm: str) -> None:
    """Raises `StateMismatchError` unless the state is of this algorithm, these parameters and these settings."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatchError(
            f"a state must have format {FORMAT}, got {found!r}; load what state_dict() of an attachment returned"
        )
    if state["algorithm"] != algorithm:
        raise StateMismatchError(
            f"the state must be of algorithm {algorithm!r}, got {state['algorithm']!r}; attach that one"
        )
    for rank, memories in state[PER_RANK].items():
        names = [entry.name for entry in tracked]
        missing = [name for name in names if name not in memories]
        unexpected = [name for name in memories if name not in names]
        if missing or unexpected:
            raise StateMismatchError(
                f"the state must hold the parameters of this model, got {unexpected[:3] or 'nothing'} it lacks and "
                f"{missing[:3] or 'nothing'} missing; load the state of this model"
            )
        for entry in tracked:
            _check_tensors(entry, memories[entry.name], rank)
    for entry in tracked:
        saved, own = state[REPLICATED]["momentum"][entry.name], getattr(entry.memory, "momentum", 0.0)
        if saved != own:
            raise StateMismatchError(
                f"momentum of {entry.name!r} must be the saved {saved!r}, got {own!r}; attach before "
                "optimizer.load_state_dict (a saved optimizer's momentum is 0 while DGC has it), with the same momentum"
            )


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
        for name, tensor in entry.memory.tensors().items():
            shaped_like(tensor, entry.parameter).copy_(state[PER_RANK][str(rank)][entry.name][name])
    _restore_replicated(state, tracked)


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
        for name, tensor in entry.memory.tensors().items():
            shaped = shaped_like(tensor.zero_(), entry.parameter)
            for memories in own:
                shaped.add_(memories[entry.name][name].to(tensor))
        if isinstance(entry.memory, MomentumCorrection):
            mean = entry.memory.u.float() / old_size
            all_reduce_sum(mean, group).wait()
            entry.memory.u.copy_(mean)
    _restore_replicated(state, tracked)
    if group.rank() == 0:
        _log.warning(
            "resumed %d ranks on %d: held-back gradients are redistributed, their sum is kept", old_size, group.size()
        )


def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state that holds the per-rank parts of several, which must come from the same checkpoint."""
    merged = dict(states[0])
    merged[PER_RANK] = {rank: memories for state in states for rank, memories in state[PER_RANK].items()}
    return merged


def _restore_replicated(state: Mapping[str, Any], tracked: Sequence[TrackedParameter]) -> None:
    replicated = state[REPLICATED]
    for entry in tracked:
        if entry.decay is not None:
            buffer = shaped_like(entry.decay.buffer, entry.parameter)
            if entry.name in replicated["decay"]:
                buffer.copy_(replicated["decay"][entry.name])
            else:
                buffer.zero_()  # saved without weight decay: its momentum starts anew
        if isinstance(entry.memory, MomentumCorrection):
            entry.memory.per_rank_velocity = bool(replicated["per_rank_velocity"][entry.name])


def _check_tensors(entry: TrackedParameter, saved: Mapping[str, Any], rank: str) -> None:
    for name in entry.memory.tensors():
        shape = tuple(saved[name].shape) if name in saved else None
        if shape != tuple(entry.parameter.shape):
            raise StateMismatchError(
                f"{name} of {entry.name!r} must have shape {tuple(entry.parameter.shape)}, got {shape} in the state of "
                f"rank {rank}; load the state of this model and these settings"
            )
