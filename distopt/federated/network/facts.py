"""Do a server and a site mean the same job? What both say of it, and the first thing in which they differ."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distopt.federated.data import ClientData
from distopt.federated.layout import Layout

PROTOCOL = 1
_REMEDIES = {
    "protocol": "install one version of distopt everywhere",
    "frozen tensors": "load the same pretrained values on every process",
    "data": "load the same samples and share them out with the same seed on every process",
    "number of clients": "give every process the data of the same clients, or say whom it hosts with hosts=",
}


def facts_of(
    *, model: nn.Module, layout: Layout, settings: Mapping[str, Any], data: ClientData | None, num_clients: int | None
) -> dict[str, Any]:
    """What one side says; data and numbers of clients that it has not are left out."""
    facts: dict[str, Any] = {"protocol": PROTOCOL, "model": layout.description, **settings}
    facts["frozen tensors"] = _digest(model, layout)
    if data is not None:
        facts["data"] = data.fingerprint
    if num_clients is not None:
        facts["number of clients"] = num_clients
    return {name: plain(fact) for name, fact in facts.items()}


def _digest(model: nn.Module, layout: Layout) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in layout.others(model).items():
        if tensor.is_floating_point():  # BatchNorm's counters go on with every run
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """As it is after a way through JSON."""
    return json.loads(json.dumps(value))


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], site: str) -> str | None:
    """In which of the facts that both have said they differ; None if in none.

    Args:
        ours: Of the server.
        theirs: Of the site; anything that JSON can hold.
        site: What it is called.
    """
    for name, own in ours.items():
        if name not in theirs or theirs[name] == own:
            continue
        if name == "model":
            return _model_difference(own, theirs[name], site)
        what, own, other = _first_difference(name, own, theirs[name])
        remedy = _REMEDIES.get(name, "give both the same, or leave it out at the site, which then takes the server's")
        return f"{what} must be the same on the server and on {site}, got {own!r:.200} and {other!r:.200}; {remedy}"
    return None


def _model_difference(own: Sequence[str], other: Any, site: str) -> str:
    theirs = [str(each) for each in other] if isinstance(other, list) else []
    pairs = enumerate(itertools.zip_longest(own, theirs, fillvalue="nothing"))
    at, (have, has) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    return (
        f"the averaged tensors of the model must be the same on the server and on {site}, got {have:.200} and "
        f"{has:.200} as number {at + 1} of them; build the same model, with the same `exclude`, on every process"
    )


def _first_difference(name: str, own: Any, other: Any) -> tuple[str, Any, Any]:
    """Inside of a configuration, where there is one."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key in {**own, **other}:
            if own.get(key) != other.get(key):
                return f"{key} of {name}", own.get(key), other.get(key)
    return name, own, other


def sample_difference(data: ClientData, hosts: Sequence[int], samples: Sequence[int], site: str) -> str | None:
    """Whether a site has another number of samples of a client than the server; None if not."""
    for client, count in zip(hosts, samples, strict=True):
        if data.num_samples(client) != count:
            return (
                f"client {client} must have as many samples on the server as on {site}, got {data.num_samples(client)} "
                f"and {count}; {_REMEDIES['data']}, or give the server num_clients instead of the data"
            )
    return None
