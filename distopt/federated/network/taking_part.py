"""A process that takes part in a federated job with the clients that it hosts.

Limits: all float tensors of the model are averaged, on the CPU. A client's data are with one site.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from distopt.comm import Transport
from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.data import ClientData
from distopt.federated.execution import LoopTrainer, Trainer
from distopt.federated.execution.averaged import check_all_averaged
from distopt.federated.execution.rehearsal import rehearse
from distopt.federated.functional import Loss, cross_entropy
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.network.facts import facts_of, plain
from distopt.federated.network.journal import Journal
from distopt.federated.network.letters import longest_frame
from distopt.federated.network.seats import (
    CLOSE_S,
    Seat,
    check_one_way,
    check_seconds,
    check_takes_part,
    find_seat,
    join_by_tcp,
)
from distopt.federated.network.site import Attendance, Site
from distopt.federated.network.site_group import GroupTrainer, follow, say_end, say_settings
from distopt.federated.simulation import check_kinds
from distopt.federated.uplink import UplinkCompression


def take_part(
    *,
    model: nn.Module,
    clients: ClientData,
    hosts: Sequence[int] | None = None,
    algorithm: FederatedAlgorithm | None = None,
    local: LocalTraining | None = None,
    loss: Loss | None = None,
    exclude: tuple[str, ...] = (),
    seed: int | None = None,
    uplink: UplinkCompression | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    wait_s: float = 60.0,
    patience_s: float = 3600.0,
    transport: str | Transport = "auto",
    server: str | None = None,
    rank: int | None = None,
    sites: int | None = None,
    secret: bytes | None = None,
    ranks_per_site: int = 1,
) -> Attendance | None:
    """Trains the clients that this process hosts, on every rank but 0, until the server ends the job.

    Args:
        model: As the server's; its parameters are overwritten.
        clients: Their data: of all clients of the job, or with `hosts` of those alone, in that order.
        hosts: The numbers of this site's clients; an even split among the sites if left out.
        algorithm: As the server's; what the server says if left out, which is compared if it is given.
        local: Likewise.
        loss: `loss(model, batch)`, the mean over a batch; cross-entropy of (inputs, labels) if left out.
        exclude: As the server's.
        seed: See `algorithm`.
        uplink: See `algorithm`.
        folder: Where vectors of clients lie in memory-mapped files; in memory if left out.
        checkpoint: A file of this site that holds what its clients keep, for a site that is started again.
        wait_s: How long the server may take to answer at the start.
        patience_s: How long the server may be silent, or gone where it can come back.
        transport: See `Service`. Or
        server: "host:port" where the server listens by TCP.
        rank: Of this site, from 1 to `sites`, with `server`.
        sites: How many sites there are, with `server`.
        secret: See `Service`.
        ranks_per_site: So many ranks, 1 to n, n + 1 to 2 n and so on, are one site: each trains a share of every batch,
            and their gradients are averaged. Their result is the simulation's up to rounding.

    Returns:
        What this site did; None on a rank that does not speak for its site.

    Raises:
        ConfigError: A value breaks its rule, or this process is rank 0.
        CompatibilityError: The server refuses this site: the reason says in what it differs.
        PeerLostError: The server cannot be reached, or is gone.
        StateMismatchError: `checkpoint` belongs to another site, or the server goes on from a round that it has not.
    """
    check_kinds(
        ("clients", clients, ClientData),
        ("algorithm", algorithm, FederatedAlgorithm | None),
        ("local", local, LocalTraining | None),
        ("uplink", uplink, UplinkCompression | None),
    )
    check_seconds(wait_s=wait_s, patience_s=patience_s)
    layout = Layout(model, exclude)
    check_all_averaged(model, layout, "a service")
    check_one_way(transport, ranks_per_site, server=server)
    if server is not None:
        seat = join_by_tcp(server, rank, sites, secret=secret, wait_s=wait_s, patience_s=patience_s)
    else:
        seat = find_seat(transport, ranks_per_site=ranks_per_site, wait_s=wait_s, secret=secret)
    check_takes_part(seat)
    group = seat.group
    hosted, data = _hosted(clients, hosts, seat)
    given = {
        "algorithm": None if algorithm is None else algorithm.to_dict(),
        "local": None if local is None else local.to_dict(),
        "seed": seed,
        "uplink": None if uplink is None else uplink.to_dict(),
    }
    whole = data is clients

    def train(settings: Mapping[str, Any]) -> LoopTrainer:
        made = {
            "model": model,
            "layout": layout,
            "algorithm": FederatedAlgorithm.from_dict(settings["algorithm"]),
            "local": LocalTraining.from_dict(settings["local"]),
            "data": data,
            "loss": loss or cross_entropy,
            "seed": settings["seed"],
            "uplink": None if settings["uplink"] is None else UplinkCompression.from_dict(settings["uplink"]),
            "folder": folder,
        }
        return LoopTrainer(**made) if group is None else GroupTrainer(group, **made)

    def build(settings: Mapping[str, Any]) -> tuple[Trainer, Journal]:
        trainer = train(settings)
        rehearse(trainer)
        if group is not None:
            say_settings(plain(settings), group)
        journal = Journal(trainer.kept, checkpoint, {"settings": plain(settings), "hosts": list(hosted)})
        journal.read()
        return trainer, journal

    opened = seat.open(longest_frame(layout))
    try:
        if not seat.leads:
            assert group is not None
            follow(group, train)
            return None
        whole = data is clients
        site = Site(
            opened,
            hosts=hosted,
            samples=[data.num_samples(client) for client in hosted],
            facts=facts_of(
                model=model,
                layout=layout,
                settings={name: value for name, value in given.items() if value is not None},
                data=clients if whole else None,
                num_clients=clients.num_clients if whole else None,
            ),
            build=build,
            wait_s=wait_s,
            patience_s=patience_s,
            may_return=seat.may_return,
        )
        try:
            return site.take_part()
        finally:
            if group is not None:
                say_end(group)
    finally:
        opened.close(CLOSE_S)


def _hosted(clients: ClientData, hosts: Sequence[int] | None, seat: Seat) -> tuple[tuple[int, ...], ClientData]:
    """Whom this site hosts, and the data by the job's numbers of the clients."""
    if hosts is None:
        if seat.num_sites > clients.num_clients:
            raise ConfigError(
                f"there must be at most one site for each of the {clients.num_clients} clients, got {seat.num_sites}; "
                "start fewer processes"
            )
        return tuple(range(seat.site, clients.num_clients, seat.num_sites)), clients
    listed = tuple(hosts)
    for client in listed:
        check_count("each of hosts", client, low=0, remedy="give the numbers of the clients")
    if not listed or len(set(listed)) != len(listed):
        raise ConfigError(f"hosts must be different clients, at least one, got {list(listed)}; name each once")
    if len(listed) == clients.num_clients and sorted(listed) != list(range(clients.num_clients)):
        empty = clients.parts[0][:0]
        parts = [empty] * (max(listed) + 1)
        for client, part in zip(listed, clients.parts, strict=True):
            parts[client] = part
        return listed, ClientData(clients.tensors, parts)
    if max(listed) >= clients.num_clients:
        raise ConfigError(
            f"hosts must be clients from 0 to {clients.num_clients - 1}, got {max(listed)}; give the data of all "
            f"clients, or of the {len(listed)} that are hosted alone"
        )
    return listed, clients
