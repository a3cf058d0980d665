"""Small facts exchanged between ranks as JSON text: nothing that arrives is unpickled. Blocking; for set-up only."""

import json
from typing import Any

import torch
import torch.distributed as dist

from distopt.comm.collectives import all_gather
from distopt.errors import CompatibilityError, DistoptError


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
