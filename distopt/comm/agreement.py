"""Small facts exchanged between ranks as JSON text: nothing that arrives is unpickled. Blocking; for set-up only."""

import json
from typing import Any

import torch
import torch.distributed as dist

from distopt.comm.collectives import all_gather


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
