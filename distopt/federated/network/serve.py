"""A federated job of several processes: one serves, the others take part with the clients that they host.

    if rank == 0:
        history = distopt.federated.serve(rounds=100, model=model, clients=data, algorithm=FedAU(), ...)
    else:
        distopt.federated.take_part(model=model, clients=data, ...)

The names are those of `Simulation` where they mean the same. A synchronous job gives the history and the model of
`Simulation(mode="loop")` to the bit.

Limits: all float tensors of the model are averaged, on the CPU. A client's data are with one site.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import nn

from distopt.comm import Transport
from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.data import ClientData
from distopt.federated.execution import LoopTrainer, Trainer
from distopt.federated.execution.averaged import check_all_averaged
from distopt.federated.execution.counters import count_batches
from distopt.federated.execution.rehearsal import rehearse
from distopt.federated.functional import Loss, cross_entropy
from distopt.federated.history import History
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.network.facts import facts_of, plain
from distopt.federated.network.journal import Journal
from distopt.federated.network.letters import TALK_BYTES
from distopt.federated.network.remote_cohort import RemoteCohort
from distopt.federated.network.roster import Roster
from distopt.federated.network.seats import (
    Seat,
    check_serves,
    check_takes_part,
    find_seat,
    join_by_tcp,
    serve_by_tcp,
)
from distopt.federated.network.site import Attendance, Site
from distopt.federated.network.site_group import GroupTrainer, follow, say_end, say_settings
from distopt.federated.participation import Everybody, Participation
from distopt.federated.privacy.job import JobFacts, check_job
from distopt.federated.randomness import check_seed
from distopt.federated.rounds import Evaluate, Progress, Rounds, check_settings
from distopt.federated.simulation import check_kinds, settings_of
from distopt.federated.uplink import UplinkCompression

_log = logging.getLogger("distopt")
_MOST_VECTORS = 6  # of a frame: what any algorithm sends at a time, with some to spare
_CLOSE_S = 10.0


class Service:
    """The server of a job; `serve` in parts, for whoever looks at it between two rounds.

    Args:
        model: Its initial parameters are the first model; afterwards it holds the last one.
        clients: The clients' data, where the server has them: then they are compared with the sites'. Else
        num_clients: How many there are.
        algorithm: Both sides' rule.
        local: What a client does in a round.
        participation: Who takes part in which round; everybody if left out. For an algorithm that does not wait: who
            may begin, if they are not at work.
        evaluate: See `Simulation`.
        evaluate_every: See `Simulation`.
        exclude: See `Simulation`; here only what does not change may be left out, such as frozen parameters.
        seed: Of everything random.
        uplink: How the clients' vectors travel; None sends them as they are.
        folder: Where tables of the server lie in memory-mapped files; in memory if left out.
        checkpoint: A file that holds the run's state, written beside and renamed.
        checkpoint_every: In rounds; 0 for never.
        progress: Called after each round with its row.
        stop_at_epsilon: See `Simulation`.
        deadline_s: How long a client may take to answer. Who takes longer does not take part in that round.
        wait_s: How long the sites may take to say hello at the start.
        fewest_sites: How many must have by then; all if left out.
        transport: "gloo" under torchrun, "mpi" under mpirun, "auto" for either, or an open one. Or
        listen: "host:port", where sites connect by TCP: an address of this machine, on the interface they come by.
        sites: How many sites there are, with `listen`.
        secret: Of the job, at least 16 bytes: who has it may take part, and every message is authenticated. That of
            DISTOPT_JOB_SECRET or DISTOPT_JOB_SECRET_FILE if left out; by TCP needed beyond this machine.
        ranks_per_site: How many ranks share a site, see `take_part`.

    Raises:
        ConfigError: A value breaks its rule, or does not fit the others; or this process is not rank 0.
        CompatibilityError: Float tensors of the model are not averaged, or mpi4py is missing.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        algorithm: FederatedAlgorithm,
        clients: ClientData | None = None,
        num_clients: int | None = None,
        local: LocalTraining | None = None,
        participation: Participation | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        exclude: tuple[str, ...] = (),
        seed: int = 0,
        uplink: UplinkCompression | None = None,
        folder: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        progress: Progress | None = None,
        stop_at_epsilon: float | None = None,
        deadline_s: float = 600.0,
        wait_s: float = 60.0,
        fewest_sites: int | None = None,
        transport: str | Transport = "auto",
        listen: str | None = None,
        sites: int | None = None,
        secret: bytes | None = None,
        ranks_per_site: int = 1,
    ) -> None:
        check_settings(evaluate_every=evaluate_every, checkpoint=checkpoint, checkpoint_every=checkpoint_every)
        check_kinds(
            ("clients", clients, ClientData | None),
            ("algorithm", algorithm, FederatedAlgorithm),
            ("local", local, LocalTraining | None),
            ("participation", participation, Participation | None),
            ("uplink", uplink, UplinkCompression | None),
        )
        _check_seconds(deadline_s=deadline_s, wait_s=wait_s)
        check_seed(seed)
        count = _num_clients(clients, num_clients)
        self.model, self.algorithm = model, algorithm
        self.local = local or LocalTraining(steps=5)
        self.layout = Layout(model, exclude)
        check_all_averaged(model, self.layout, "a service")
        facts = JobFacts(
            model=model,
            layout=self.layout,
            num_clients=count,
            sample_counts=None if clients is None else [len(part) for part in clients.parts],
            local=local,
            participation=participation,
            uplink=uplink,
            checkpoint_every=checkpoint_every,
            stop_at_epsilon=stop_at_epsilon,
        )
        check_job(algorithm, facts)
        drawn = (participation or Everybody()).begin(count, seed)
        _check_one_way(transport, ranks_per_site, listen=listen)
        if listen is not None:
            seat = serve_by_tcp(listen, sites, secret=secret)
        else:
            seat = find_seat(transport, ranks_per_site=ranks_per_site, wait_s=wait_s, secret=secret)
        check_serves(seat)
        if seat.num_sites > count:
            raise ConfigError(
                f"there must be at most one site for each of the {count} clients, got {seat.num_sites}; start fewer "
                "processes"
            )
        if fewest_sites is not None:
            check_count("fewest_sites", fewest_sites, low=1, remedy="leave it out to wait for all")
            if fewest_sites > seat.num_sites:
                raise ConfigError(
                    f"fewest_sites must be at most the job's {seat.num_sites} sites, got {fewest_sites}; leave it out "
                    "to wait for all"
                )
        settings = {
            "algorithm": plain(algorithm.to_dict()),
            "local": plain(self.local.to_dict()),
            "seed": seed,
            "uplink": None if uplink is None else plain(uplink.to_dict()),
            "number of clients": count,
        }
        self._transport = seat.open(longest_frame(self.layout))
        try:
            self._roster = Roster(
                self._transport,
                facts=facts_of(model=model, layout=self.layout, settings=settings, data=clients, num_clients=count),
                settings=settings,
                num_clients=count,
                data=clients,
            )
            self._cohort = RemoteCohort(
                self._transport,
                self._roster,
                algorithm=algorithm,
                participation=drawn,
                uplink=uplink,
                num_trained=self.layout.num_trained,
                dtype=self.layout.dtype,
                seed=seed,
                deadline_s=deadline_s,
                wait_s=wait_s,
                fewest_sites=fewest_sites or seat.num_sites,
                leaders=seat.leaders,
                may_return=seat.may_return,
                count_batches=partial(count_batches, model),
                described={
                    "local": self.local.to_dict(),
                    "seed": seed,
                    "uplink": None if uplink is None else uplink.to_dict(),
                    "data": f"{count} clients" if clients is None else clients.fingerprint,
                    "mode": "network",
                    "participation": settings_of(participation),
                },
            )
            self._rounds = Rounds(
                model=model,
                layout=self.layout,
                algorithm=algorithm,
                cohort=self._cohort,
                num_clients=count,
                evaluate=evaluate,
                evaluate_every=evaluate_every,
                folder=folder,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                progress=progress,
                stop_at_epsilon=stop_at_epsilon,
            )
        except BaseException:
            self._transport.close(_CLOSE_S)
            raise
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("" if error is None else f"{type(error).__name__}: {error}")

    @property
    def history(self) -> History:
        """Of all rounds that are done."""
        return self._rounds.history

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._rounds.round

    @property
    def refused(self) -> Mapping[str, int]:
        """How many messages, and connections by TCP, did not count, by reason."""
        unheard = Counter[str](getattr(self._transport, "refused", {}))
        return dict(Counter(self._rounds.refused) + self._roster.refused + unheard)

    @property
    def address(self) -> str:
        """Where sites connect by TCP; empty where they do not."""
        return str(getattr(self._transport, "address", ""))

    @property
    def sites(self) -> Sequence[int]:
        """Ranks of the sites that can be given work."""
        return self._roster.ready

    @property
    def bytes_sent(self) -> int:
        """By this process since its start, in frames: a broadcast travels once to a site, however many it hosts."""
        return self._roster.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `bytes_sent`."""
        return self._cohort.bytes_received

    def run(self, rounds: int) -> History:
        """Goes on until `rounds` rounds are done, those of a checkpoint included; the history of all of them.

        Raises:
            ConfigError: More rounds are done already, or `evaluate` does not give numbers.
            CompatibilityError: A site does not fit.
            PeerLostError: The sites do not come, or are gone.
        """
        return self._rounds.run(rounds)

    def save(self) -> None:
        """Writes the checkpoint."""
        self._rounds.save()

    def resume(self) -> bool:
        """Takes the checkpoint back, if there is one; whether there was. Before `run`.

        Raises:
            StateMismatchError: It belongs to another run, or is damaged.
        """
        return self._rounds.resume()

    def close(self, reason: str = "") -> None:
        """Tells the sites that nothing more comes; a reason makes it an error there."""
        if self._closed:
            return
        self._closed = True
        self._cohort.end(reason)
        self._transport.close(_CLOSE_S)


def serve(*, rounds: int, resume: bool = True, **settings: Any) -> History:
    """Serves a job on rank 0 until `rounds` rounds are done; the history of all of them.

    Args:
        rounds: How many in all, those of a checkpoint included.
        resume: Whether to go on from `checkpoint` where that file is there.
        settings: Of `Service`.

    Raises:
        ConfigError: A value breaks its rule, or does not fit the others; or this process is not rank 0.
        CompatibilityError: A site does not fit.
        PeerLostError: The sites do not come, or are gone.
        StateMismatchError: The checkpoint belongs to another run, or is damaged.
    """
    with Service(**settings) as service:
        if resume and settings.get("checkpoint") is not None and service.resume():
            _log.info("going on after round %d, from %s", service.round, settings["checkpoint"])
        return service.run(rounds)


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
    _check_seconds(wait_s=wait_s, patience_s=patience_s)
    layout = Layout(model, exclude)
    check_all_averaged(model, layout, "a service")
    _check_one_way(transport, ranks_per_site, server=server)
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
        opened.close(_CLOSE_S)


def longest_frame(layout: Layout) -> int:
    """Of a job with such a model, in bytes."""
    return TALK_BYTES + 4096 + _MOST_VECTORS * layout.num_elements * layout.dtype.itemsize


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


def _check_one_way(transport: str | Transport, ranks_per_site: int, **address: str | None) -> None:
    ((name, given),) = address.items()
    if given is not None and transport != "auto":
        raise ConfigError(f"one of transport and {name} says how processes talk, got both; leave transport out")
    if given is not None and ranks_per_site != 1:
        raise ConfigError(
            f"ranks_per_site must be 1 beside {name}, got {ranks_per_site}; sites of several ranks are torchrun's"
        )


def _num_clients(clients: ClientData | None, num_clients: int | None) -> int:
    if num_clients is not None:
        check_count("num_clients", num_clients, low=1, remedy="give how many clients there are")
    if clients is None:
        if num_clients is None:
            raise ConfigError("one of clients and num_clients must be given, got none; num_clients=10, say")
        return num_clients
    if num_clients not in (None, clients.num_clients):
        raise ConfigError(
            f"num_clients must be {clients.num_clients} beside these clients, got {num_clients}; leave it out"
        )
    return clients.num_clients


def _check_seconds(**seconds: float) -> None:
    for name, value in seconds.items():
        check_number(name, value, rule="a number of seconds above 0", remedy="use 60.0", low=0.0, high=1e9)
