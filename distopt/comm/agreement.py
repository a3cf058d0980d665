"""Small facts exchanged between ranks as JSON text: nothing that arrives is unpickled. Blocking; for set-up only."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from distopt.comm.collectives import all_gather
from distopt.errors import CompatibilityError, DesyncError, DistoptError


def gather_json(fact: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """What each rank said, in rank order. Collective.

    Args:
        fact: Anything that JSON can hold; sizes may differ between ranks.
        group: The ranks.
        device: Where the group's backend wants its tensors.
    """
    text = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8).to(device)
    lengths, done = all_gather(torch.tensor([text.numel()], device=device), group)
    done.wait()
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=device)
    padded[: text.numel()] = text
    texts, done = all_gather(padded, group)
    done.wait()
    return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(texts, lengths.view(-1), strict=True)]


def raise_together(
    problem: DistoptError | None, group: dist.ProcessGroup, device: torch.device, *, what: str = "cannot go on"
) -> None:
    """Raises on every rank if any rank has a problem, so that none waits for the others. Collective.

    Args:
        problem: Of this rank.
        group: The ranks.
        device: Where the group's backend wants its tensors.
        what: What the rank with the problem cannot do, for the message of the others.

    Raises:
        DistoptError: The problem of this rank, or a `CompatibilityError` that quotes another's.
    """
    texts = gather_json(None if problem is None else str(problem), group, device)
    if problem is not None:
        raise problem
    for rank, text in enumerate(texts):
        if text is not None:
            raise CompatibilityError(f"rank {rank} {what}: {text}")


def agree(
    own: Mapping[str, Any] | None, problem: DistoptError | None, group: dist.ProcessGroup, device: torch.device
) -> None:
    """Compares fingerprints; if one has a problem all raise, so that none waits for the others. Collective.

    Args:
        own: This rank's fingerprint, or None with a problem.
        problem: Why this rank cannot attach.
        group: The ranks.
        device: Where the group's backend wants its tensors.

    Raises:
        DistoptError: The problem of this rank.
        CompatibilityError: The problem of another rank.
        DesyncError: Two ranks differ; names both.
    """
    raise_together(problem, group, device, what="cannot attach")
    facts = gather_json(own, group, device)
    for rank, fact in enumerate(facts):
        for key, value in facts[0].items():
            if repr(fact[key]) != repr(value):  # the order of name patterns counts too
                raise DesyncError(
                    f"every rank must attach with the same {key}, got {_shown(value, fact[key])} on rank 0 and "
                    f"{_shown(fact[key], value)} on rank {rank}; start all ranks from the same code and settings"
                )


def _shown(value: Any, other: Any) -> str:
    """The value, or of a mapping only what differs from the other."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        keys = [*value, *(key for key in other if key not in value)]  # what one leaves out is None there
        value = {key: value.get(key) for key in keys if repr(other.get(key)) != repr(value.get(key))}
    return repr(value)
