"""Gradient descent on all clients' data with clipped gradients and noise: DIFF2-GD, and DP-GD as its simplest case.

Murata & Suzuki, *DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex Distributed Learning*,
ICML 2023, 2302.03884. With P clients, of which p has n_p samples:

    restart:     v_r = mean_p mean_j clip(grad l_j(x_r), C1) + N(0, (C1 s1)^2 I)
    otherwise:   v_r = v_{r-1} + mean_p mean_j clip(grad l_j(x_r) - grad l_j(x_{r-1}), C2 D_r) + N(0, (C2 D_r s2)^2 I),
                 D_r = ||x_r - x_{r-1}||
    x_{r+1} = x_r - eta v_r

Every T-th round restarts. Clients take no local steps: they look at each of their samples once, at x_r and, if it is no
restart, at x_{r-1}, which the server sends too. They divide the sum of the clipped vectors by n_p, once.

Noise that is "central" is added by the server to the mean: the server is trusted, the models are protected. Noise that
is "distributed" is added by every client to its own mean, with sqrt(P) times the standard deviation, so that the mean
has the same: the models are protected as before, and each message to the server is protected too, with sqrt(P) times
less noise than all together.

Everybody takes part in every round. A round in which somebody is missing does not count: the model stays, nothing is
released (with distributed noise it is counted all the same, as the server has seen messages), the history's row names
who was missing, and the next round restarts.

Limits: the guarantee is for one sample (replaced by another), and takes its client's number of samples for public.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distopt.config import check_choice, check_count
from distopt.errors import ConfigError, StateMismatchError
from distopt.federated.algorithm import LinearAlgorithm, Look, Vectors, WeightedSum
from distopt.federated.checks import check_above_zero
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply
from distopt.federated.privacy.accountant import Releases, check_epsilon, epsilon_of
from distopt.federated.privacy.calibration import Noise, Plan, calibrated, releases
from distopt.federated.privacy.noise import NoiseSource
from distopt.federated.privacy.private_algorithm import EPSILON_TO_SERVER, MISSED, PrivateAlgorithm

_log = logging.getLogger("distopt")
CENTRAL, DISTRIBUTED = "central", "distributed"
RESTART, DIFFERENCE = "restart", "difference"
PREVIOUS, ESTIMATE = "previous", "estimate"
_ROUNDS = "rounds"


@dataclass(frozen=True, kw_only=True)
class PrivateDescent(PrivateAlgorithm, LinearAlgorithm):
    """See the module; a subclass says T and C2.

    Args:
        lr: eta.
        clip: C1, the norm that a sample's gradient is clipped to.
        epsilon: Of all rounds together; a run ends before a round that would pass it.
        rounds: R, over which epsilon is spread.
        num_clients: P.
        fewest_samples: The samples of the client that has the fewest: the noise is computed for it.
        noise: "central" or "distributed", see the module.
        delta: See `PrivateAlgorithm`.
        accountant: See `PrivateAlgorithm`; it says how much noise epsilon needs, and what a run has spent.
        noise_seed: See `PrivateAlgorithm`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    lr: float = 0.1  # larger moves further along a noisy direction
    clip: float = 1.0  # larger: less of a large gradient is cut off, and more noise
    epsilon: float = 3.0  # smaller: more private, and more noise
    rounds: int = 1000  # more: more noise in each
    num_clients: int
    fewest_samples: int  # more: less noise
    noise: str = CENTRAL  # "distributed" protects from the server too, somewhat

    kinds = (RESTART, DIFFERENCE)
    takes_steps = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("lr", self.lr, remedy="use 0.1")
        check_above_zero("clip", self.clip, remedy="use 1.0")
        check_epsilon(self.epsilon)
        check_count("rounds", self.rounds, low=1, remedy="give how many rounds share the epsilon")
        check_count("num_clients", self.num_clients, low=1, remedy="give how many clients take part")
        check_count("fewest_samples", self.fewest_samples, low=1, remedy="give the samples of the smallest client")
        check_choice("noise", self.noise, (CENTRAL, DISTRIBUTED))

    @property
    @abstractmethod
    def restart_every(self) -> int:
        """T."""

    @property
    @abstractmethod
    def bound_of_differences(self) -> float:
        """C2."""

    @property
    def fewest_replies(self) -> int:
        """All of them."""
        return self.num_clients

    @property
    def most_epsilon(self) -> float:
        """See `PrivateAlgorithm.most_epsilon`."""
        return self.epsilon

    @property
    def plan(self) -> Plan:
        """What the noise is computed for."""
        return Plan(
            epsilon=self.epsilon,
            delta=self.delta,
            rounds=self.rounds,
            interval=self.restart_every,
            fewest_samples=self.fewest_samples,
            num_clients=self.num_clients,
        )

    @property
    def noise_of_mean(self) -> Noise:
        """s1 and s2, see `calibration`."""
        return calibrated(self.accountant, self.plan)

    def clip_and_std(self, here: Tensor, previous: Tensor | None) -> tuple[float, float]:
        """The norm that a sample's vector is clipped to, and the standard deviation of the noise on the mean.

        Args:
            here: (d,), x_r.
            previous: (d,), x_{r-1}; None in a restart.
        """
        noise = self.noise_of_mean
        if previous is None:
            return self.clip, self.clip * noise.restart
        bound = self.bound_of_differences * float((here.double() - previous.double()).norm())
        return bound, bound * noise.difference

    # -- client --------------------------------------------------------------------------------------------------------

    def look(self, look: Look) -> Vectors:
        """See `FederatedAlgorithm.look`.

        Raises:
            ConfigError: The client has fewer samples than the noise is computed for.
        """
        if look.num_samples < self.fewest_samples:
            raise ConfigError(
                f"fewest_samples must be at most what each client has, got {self.fewest_samples} and client "
                f"{look.client} with {look.num_samples}; leave that client out, or lower fewest_samples"
            )
        previous = look.extras.get(PREVIOUS)
        bound, std = self.clip_and_std(look.model, previous)
        mean = (look.clipped_sum(bound, previous) / look.num_samples).to(look.model.dtype)
        if self.noise == DISTRIBUTED:
            share = std * math.sqrt(self.num_clients)
            mean = NoiseSource(self.noise_seed).add(mean, share, self.name, look.version, look.client)
        return {DELTA: mean}

    # -- server --------------------------------------------------------------------------------------------------------

    def begin(self, memory: ServerMemory) -> None:
        """Also checks that there are as many clients as the noise is computed for."""
        self.check_num_clients(memory.num_clients)
        super().begin(memory)
        memory.counters[_ROUNDS] = RoundsSinceRestart()
        if self.restart_every > 1:
            memory.remember(ESTIMATE)
            memory.remember(PREVIOUS)

    def check_num_clients(self, num_clients: int) -> None:
        """Raises `ConfigError` if a job has another number of clients than the noise is computed for."""
        if num_clients != self.num_clients:
            raise ConfigError(
                f"num_clients must be that of the job, {num_clients}, got {self.num_clients}; change it: the noise is "
                "computed for it"
            )

    def next_kind(self, memory: ServerMemory) -> str:
        """See `PrivateAlgorithm.next_kind`."""
        return DIFFERENCE if memory.counters[_ROUNDS].count else RESTART

    def releases(self, counts: Mapping[str, int]) -> Sequence[Releases]:
        """See `PrivateAlgorithm.releases`."""
        return releases(self.noise_of_mean, self.plan, counts[RESTART], counts[DIFFERENCE])

    def columns(self, memory: ServerMemory) -> dict[str, Any]:
        """Also who was missing, and what the messages of a client cost, where they have noise."""
        found = super().columns(memory)
        if self.noise == DISTRIBUTED:
            found[EPSILON_TO_SERVER] = self.spent_to_server(memory)
        if missed := memory.counters[_ROUNDS].missed:
            found[MISSED] = list(missed)
        return found

    def spent_to_server(self, memory: ServerMemory) -> float:
        """The epsilon of what one client has sent, by itself; infinite where it adds no noise."""
        if self.noise == CENTRAL:
            return math.inf if any(self.ledger(memory).counts.values()) else 0.0
        # The client's mean moves by 2 C/n_p, P times as far as the mean over the clients, under sqrt(P) times the noise
        share = 1 / math.sqrt(self.num_clients)
        own = [
            Releases(noise_multiplier=share * each.noise_multiplier, count=each.count)
            for each in self.releases(self.ledger(memory).counts)
        ]
        return epsilon_of(self.accountant, own, self.delta)

    def add_clients(self, memory: ServerMemory, count: int) -> None:
        """See `FederatedAlgorithm.add_clients`.

        Raises:
            ConfigError: The noise was computed for the clients that there are.
        """
        if count:
            raise ConfigError(
                f"no client may join in a run of {self.name!r}, whose noise is computed for {memory.num_clients}, got "
                f"{count} more; begin a new run with all of them"
            )

    def extras(self, memory: ServerMemory) -> Vectors:
        """x_{r-1}, unless it is a restart."""
        return {PREVIOUS: memory.vectors[PREVIOUS]} if self.next_kind(memory) == DIFFERENCE else {}

    def why_not(self, reply: Reply) -> str | None:
        """See `FederatedAlgorithm.why_not`."""
        return "too few samples" if reply.num_samples < self.fewest_samples else None

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """The same for all: the mean over the clients is not weighted by samples."""
        return [1 / self.num_clients] * len(replies)

    def sums(self, replies: Sequence[Reply], weights: Sequence[float]) -> Mapping[str, WeightedSum]:
        """See `LinearAlgorithm.sums`."""
        return {DELTA: WeightedSum(DELTA, weights)}

    def move(self, memory: ServerMemory, model: Tensor, sums: Vectors) -> Tensor:
        """See `LinearAlgorithm.move`."""
        previous = memory.vectors[PREVIOUS] if self.next_kind(memory) == DIFFERENCE else None
        found = sums[DELTA]
        if self.noise == CENTRAL:
            std = self.clip_and_std(model, previous)[1]
            found = self.noise_source(memory).add(found, std, self.name, memory.version)
        estimate = found if previous is None else memory.vectors[ESTIMATE] + found
        if self.restart_every > 1:
            memory.vectors[ESTIMATE], memory.vectors[PREVIOUS] = estimate, model.clone()
        return torch.sub(model, estimate, alpha=self.lr)

    def tick(self, memory: ServerMemory, participated: Tensor) -> None:
        """See `FederatedAlgorithm.tick`."""
        complete = bool(participated.all())
        if complete or self.noise == DISTRIBUTED:
            self.ledger(memory).note(self.next_kind(memory))
        rounds: RoundsSinceRestart = memory.counters[_ROUNDS]
        rounds.missed = tuple((~participated).nonzero().flatten().tolist())
        rounds.count = (rounds.count + 1) % self.restart_every if complete else 0
        if not complete:
            _log.warning(
                "round %d of %s does not count, because client %s gave no answer that does; the next one restarts",
                memory.version + 1, self.name, ", ".join(map(str, rounds.missed)),
            )  # fmt: skip


class RoundsSinceRestart:
    """Where in its interval a run is.

    Attributes:
        count: Rounds that count since the last restart began; 0 for one that is to come.
        missed: The clients without which the last round did not count.
    """

    def __init__(self) -> None:
        self.count = 0
        self.missed: tuple[int, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"count": self.count, "missed": list(self.missed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It is damaged.
        """
        count = state.get("count")
        if not isinstance(count, int) or count < 0:
            raise StateMismatchError(f"the rounds since a restart must be a count, got {count!r}; the state is damaged")
        self.count, self.missed = count, tuple(state.get("missed", ()))
