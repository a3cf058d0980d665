"""What a job must be so that its algorithm's guarantee holds, and when it ends: for every engine the same.

An engine describes itself (`JobFacts`), is refused at its start where it will not do (`check_job`), and asks a `Budget`
in each round.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distopt.errors import CompatibilityError, ConfigError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.checks import check_above_zero
from distopt.federated.dp_fedavg import DPFedAvg
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.memory import ServerMemory
from distopt.federated.participation import Bernoulli, Everybody, Participation, TracedParticipation
from distopt.federated.privacy.per_sample import check_per_sample
from distopt.federated.privacy.private_algorithm import PrivateAlgorithm
from distopt.federated.privacy.private_descent import PrivateDescent
from distopt.federated.uplink import UplinkCompression

_log = logging.getLogger("distopt")
_ROUNDING = 1e-9  # relative: the last round of a calibrated run may end at epsilon itself


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """A job, as far as an algorithm may not go with all of it.

    Attributes:
        model: That is trained.
        layout: Of the model.
        num_clients: How many are registered.
        sample_counts: Of each client; None where the server does not know them before they reply.
        local: What clients do in a round; None if nothing was said.
        participation: Who takes part; None for everybody.
        uplink: How clients' vectors travel.
        checkpoint_every: In rounds; 0 for never.
        simulated: Whether all clients are computed for the server, on data that it has.
        stop_at_epsilon: Where the run is to end, if that was said.
    """

    model: nn.Module
    layout: Layout
    num_clients: int
    sample_counts: Sequence[int] | None = None
    local: LocalTraining | None = None
    participation: Participation | None = None
    uplink: UplinkCompression | None = None
    checkpoint_every: int = 0
    simulated: bool = False
    stop_at_epsilon: float | None = None


def check_job(algorithm: FederatedAlgorithm, facts: JobFacts) -> None:
    """Raises if the job is none for this algorithm; any engine calls it before the first round.

    Raises:
        ConfigError: A setting of the job does not go with the algorithm.
        CompatibilityError: The model does not.
    """
    if facts.stop_at_epsilon is not None:
        remedy = "use 3.0, or leave it out"
        check_above_zero("stop_at_epsilon", facts.stop_at_epsilon, remedy=remedy)
        if not isinstance(algorithm, PrivateAlgorithm):
            raise ConfigError(
                f"stop_at_epsilon must be left out for {algorithm.name!r}, which is not private, got "
                f"{facts.stop_at_epsilon!r}; use 'diff2', 'dp-gd' or 'dp-fedavg'"
            )
    if not algorithm.takes_steps:
        _check_whole(algorithm, facts)
    if isinstance(algorithm, PrivateAlgorithm):
        _check_private(algorithm, facts)
    if isinstance(algorithm, PrivateDescent):
        _check_descent(algorithm, facts)
    if isinstance(algorithm, DPFedAvg) and algorithm.sampling_probability is not None:
        _check_sampling(algorithm, facts.participation)


class Budget:
    """When a run ends for what it has spent.

    Args:
        algorithm: Of the job; one that is not private never ends.
        stop_at_epsilon: Where the run is to end, besides what the algorithm's settings promise.
    """

    def __init__(self, algorithm: FederatedAlgorithm, stop_at_epsilon: float | None = None) -> None:
        self._algorithm = algorithm if isinstance(algorithm, PrivateAlgorithm) else None
        self._limit = math.inf if stop_at_epsilon is None else stop_at_epsilon
        if self._algorithm is not None:
            self._limit = min(self._limit, self._algorithm.most_epsilon)

    def is_spent(self, memory: ServerMemory) -> bool:
        """Whether one more round would pass the limit."""
        if self._algorithm is None or self._limit == math.inf:
            return False
        return self._algorithm.spent_after_another(memory) > self._limit * (1 + _ROUNDING)

    def say_that_it_is_spent(self, round: int, memory: ServerMemory) -> None:
        """Logs why the `round`-th round does not take place."""
        assert self._algorithm is not None
        _log.warning(
            "%s ends before round %d: epsilon is %.4g, would be %.4g, and may be %.4g", self._algorithm.name, round,
            self._algorithm.spent(memory), self._algorithm.spent_after_another(memory), self._limit,
        )  # fmt: skip

    def columns(self, memory: ServerMemory) -> dict[str, Any]:
        """What the history's row of the round that has just ended gets."""
        return {} if self._algorithm is None else self._algorithm.columns(memory)

    def share_secrets(
        self, memory: ServerMemory, said_by_leader: Callable[[Callable[[], list[int]]], list[int]]
    ) -> None:
        """Lets several processes that compute one server draw the same noise."""
        if self._algorithm is not None:
            self._algorithm.share_secrets(memory, said_by_leader)


def _check_whole(algorithm: FederatedAlgorithm, facts: JobFacts) -> None:
    check_per_sample(facts.model)
    if facts.local is not None:
        raise ConfigError(
            f"local must be left out for {algorithm.name!r}, whose clients take no local steps, got {facts.local!r}; "
            "its lr and its clipping are settings of the algorithm"
        )
    if facts.uplink is not None:
        raise ConfigError(
            f"uplink must be left out for {algorithm.name!r}, whose noise is for sums that are sent as they are, got "
            f"{facts.uplink!r}"
        )


def _check_private(algorithm: PrivateAlgorithm, facts: JobFacts) -> None:
    if facts.layout.num_elements > facts.layout.num_trained:
        behind = facts.layout.names[len(facts.layout.trained_names)]
        raise CompatibilityError(
            f"everything that clients send must be trained for {algorithm.name!r}, got the buffer {behind!r}, whose "
            "mean would travel without noise; use GroupNorm in place of BatchNorm, or exclude it"
        )
    if algorithm.noise_seed is not None:
        if not facts.simulated:
            raise ConfigError(
                f"noise_seed must be left out where clients are real, got {algorithm.noise_seed}: whoever knows it can "
                "take the noise away"
            )
    elif facts.checkpoint_every > 1:
        raise ConfigError(
            f"checkpoint_every must be 1 or 0 for {algorithm.name!r}, got {facts.checkpoint_every}: a resumed run "
            "would release the rounds since the checkpoint once more, with other noise, and not count them; a "
            "simulation may give noise_seed"
        )


def _check_descent(algorithm: PrivateDescent, facts: JobFacts) -> None:
    if not isinstance(facts.participation, Everybody | TracedParticipation | None):
        raise ConfigError(
            f"participation must be everybody for {algorithm.name!r}, in which a round without somebody does not "
            f"count, got {facts.participation!r}; leave it out (a trace may say who is missing)"
        )
    algorithm.check_num_clients(facts.num_clients)
    if facts.sample_counts is None:
        return
    least = min(range(len(facts.sample_counts)), key=facts.sample_counts.__getitem__)
    if facts.sample_counts[least] < algorithm.fewest_samples:
        raise ConfigError(
            f"fewest_samples must be at most what each client has, {facts.sample_counts[least]} of client {least}, "
            f"got {algorithm.fewest_samples}; lower it, or leave small clients out"
        )


def _check_sampling(algorithm: DPFedAvg, participation: Participation | None) -> None:
    if not isinstance(participation, Bernoulli) or participation.probability != algorithm.sampling_probability:
        raise ConfigError(
            f"participation must be Bernoulli(probability={algorithm.sampling_probability}) where sampling is counted, "
            f"got {participation!r}; change it, or leave sampling_probability out"
        )
