"""The server of a federated job of several processes.

The names are those of `Simulation` where they mean the same. A synchronous job gives the history and the model of
`Simulation(mode="loop")` to the bit.

Limits: all float tensors of the model are averaged, on the CPU.
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
from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.data import ClientData
from distopt.federated.execution.averaged import check_all_averaged
from distopt.federated.execution.counters import count_batches
from distopt.federated.history import History
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.network.facts import facts_of, plain
from distopt.federated.network.letters import longest_frame
from distopt.federated.network.remote_cohort import RemoteCohort
from distopt.federated.network.roster import Roster
from distopt.federated.network.seats import (
    CLOSE_S,
    check_one_way,
    check_seconds,
    check_serves,
    find_seat,
    serve_by_tcp,
)
from distopt.federated.participation import Everybody, Participation
from distopt.federated.privacy.job import JobFacts, check_job
from distopt.federated.randomness import check_seed
from distopt.federated.rounds import Evaluate, Progress, Rounds, check_settings
from distopt.federated.simulation import check_kinds, settings_of
from distopt.federated.uplink import UplinkCompression

_log = logging.getLogger("distopt")


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
        check_seconds(deadline_s=deadline_s, wait_s=wait_s)
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
        check_one_way(transport, ranks_per_site, listen=listen)
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
            self._transport.close(CLOSE_S)
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
        """By this process since its start, in letters."""
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
            ConfigError: Rounds have been run; the sites would not hear of it.
            StateMismatchError: It belongs to another run, or is damaged.
        """
        if self._roster.session:
            raise ConfigError(
                f"resume must come before run, got it after round {self.round}; close this service and make another one"
            )
        return self._rounds.resume()

    def close(self, reason: str = "") -> None:
        """Tells the sites that nothing more comes; a reason makes it an error there."""
        if self._closed:
            return
        self._closed = True
        self._cohort.end(reason)
        self._transport.close(CLOSE_S)


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
