"""DP-FedAvg: federated averaging in which no client counts for more than a bound, and noise hides who was there.

McMahan, Ramage, Talwar & Zhang, *Learning Differentially Private Recurrent Language Models*, ICLR 2018; with
`quantile`, the bound follows a quantile of the updates' norms: Andrew, Thakkar, McMahan & Ramaswamy, *Differentially
Private Learning with Adaptive Clipping*, NeurIPS 2021. With S who replied, m the number that is expected, z the noise
multiplier:

    x+ = x + eta_g * (1/m) (sum_S Delta_i min(1, C/||Delta_i||) + N(0, (z C)^2 I))

Adaptive: b_i = 1 where ||Delta_i|| <= C; part of z pays for the noisy share of those,

    share = 1/2 + (1/m) (sum_S (b_i - 1/2) + N(0, s_b^2)),    C+ = C exp(-eta_C (share - quantile))
    and the sum's multiplier is (z^-2 - (2 s_b)^-2)^(-1/2), so that both together cost what z does

(centred on 1/2, a client moves that sum by at most 1/2). Clients count the same, whatever their samples.

The server clips, so that a client that breaks the rules cannot break the guarantee of the others. It sees the updates:
it is trusted, the models that it gives out are protected. What is protected is whether a client took part in any round
at all, whatever it sent.

With `sampling_probability` every client is drawn by chance in each round, by itself, with this probability and in
secret, and "rdp" counts what that gains; an empty round then adds noise too, as it must not be told from one with a
client. Without it nothing is gained: everybody may know who takes part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distopt.config import check_count, check_number
from distopt.errors import ConfigError, StateMismatchError
from distopt.federated.checks import check_above_zero, check_from_zero
from distopt.federated.deltas import SteppingServer
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply
from distopt.federated.privacy.accountant import RDP, Releases, check_epsilon, smallest_multiplier
from distopt.federated.privacy.private_algorithm import CLIP, PrivateAlgorithm
from distopt.federated.rows import weighted_rows

ROUND = "round"
_PART_OF_EXPECTED = 20  # s_b = m/20, as Andrew et al. set it


@dataclass(frozen=True, kw_only=True)
class DPFedAvg(PrivateAlgorithm, SteppingServer, name="dp-fedavg"):
    """See the module.

    Args:
        clip: C, or where it begins if it is adaptive.
        noise_multiplier: z; or
        epsilon: that of all `rounds` together, from which z is computed; a run ends before a round that would pass it.
        rounds: Over which epsilon is spread.
        expected_clients: m, a number that does not depend on the data; None for all registered ones, times the
            sampling probability.
        sampling_probability: With which each client is drawn; None if nothing is to be gained.
        quantile: Of the norms that the bound follows; None keeps it.
        clip_lr: eta_C.
        share_std: s_b; None for m/20, and at least z.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`; it sees only what is protected already.
        delta: See `PrivateAlgorithm`.
        accountant: See `PrivateAlgorithm`.
        noise_seed: See `PrivateAlgorithm`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    clip: float = 1.0  # larger: less of a long update is cut off, and more noise
    noise_multiplier: float | None = None  # larger: more private
    epsilon: float | None = None  # smaller: more private
    rounds: int | None = None  # more: more noise in each
    expected_clients: float | None = None  # more than there are makes steps and noise smaller
    sampling_probability: float | None = None  # smaller: less to pay per round, fewer clients against the noise
    quantile: float | None = None  # larger: fewer updates are cut
    clip_lr: float = 0.2  # larger: the bound follows faster
    share_std: float | None = None  # larger: more of z is left for the updates

    kinds = (ROUND,)

    def __post_init__(self) -> None:
        PrivateAlgorithm.__post_init__(self)
        SteppingServer.__post_init__(self)
        check_above_zero("clip", self.clip, remedy="use 1.0")
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ConfigError(
                f"noise_multiplier must be given where epsilon is not, and only there, got {self.noise_multiplier!r} "
                f"beside epsilon={self.epsilon!r}; give one of them"
            )
        if self.noise_multiplier is not None:
            check_above_zero("noise_multiplier", self.noise_multiplier, remedy="use 1.0")
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        if self.epsilon is not None or self.rounds is not None:
            check_count("rounds", self.rounds, low=1, remedy="give how many rounds share the epsilon")
        if self.expected_clients is not None:
            check_above_zero("expected_clients", self.expected_clients, remedy="use the mean of a round")
        if (chance := self.sampling_probability) is not None:
            remedy = "use 0.1, or leave it out"
            check_number("sampling_probability", chance, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)
            if self.accountant != RDP:
                raise ConfigError(
                    f"accountant must be {RDP!r} beside sampling_probability={chance!r}, got {self.accountant!r}, "
                    "which cannot count what sampling gains; change it, or leave sampling_probability out"
                )
        if self.quantile is not None:
            remedy = "use 0.5, the median"
            check_number("quantile", self.quantile, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)
        check_from_zero("clip_lr", self.clip_lr, remedy="use 0.2")
        if self.share_std is not None:
            check_above_zero("share_std", self.share_std, remedy="leave it out for m/20")

    @property
    def fewest_replies(self) -> int:
        """None where nobody may know who was drawn: noise is added to nothing."""
        return 1 if self.sampling_probability is None else 0

    @property
    def most_epsilon(self) -> float:
        """See `PrivateAlgorithm.most_epsilon`."""
        return math.inf if self.epsilon is None else self.epsilon

    @property
    def multiplier(self) -> float:
        """The noise multiplier z, given or computed."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        assert self.rounds is not None
        chance = self.sampling_probability or 1.0
        return smallest_multiplier(self.accountant, self.epsilon, self.delta, self.rounds, sampling=chance)

    def expected(self, memory: ServerMemory) -> float:
        """The number m of clients that a sum is divided by."""
        if self.expected_clients is not None:
            return self.expected_clients
        return memory.num_clients * (self.sampling_probability or 1.0)

    def multipliers(self, expected: float) -> tuple[float, float]:
        """The noise multiplier of the sum, and s_b; 0.0 of a bound that is kept.

        Raises:
            ConfigError: `share_std` leaves nothing for the sum.
        """
        if self.quantile is None:
            return self.multiplier, 0.0
        share_std = max(expected / _PART_OF_EXPECTED, self.multiplier) if self.share_std is None else self.share_std
        left = self.multiplier**-2 - (2 * share_std) ** -2
        if left <= 0:
            raise ConfigError(
                f"share_std must be above half the noise multiplier, {self.multiplier / 2:g}, got {share_std!r}; make "
                "it larger, or leave it out"
            )
        return left**-0.5, share_std

    # -- what it costs -------------------------------------------------------------------------------------------------

    def releases(self, counts: Mapping[str, int]) -> Sequence[Releases]:
        """See `PrivateAlgorithm.releases`."""
        chance = self.sampling_probability or 1.0
        return [Releases(noise_multiplier=self.multiplier, count=counts[ROUND], sampling=chance)]

    def next_kind(self, memory: ServerMemory) -> str:
        """See `PrivateAlgorithm.next_kind`."""
        return ROUND

    # -- server --------------------------------------------------------------------------------------------------------

    def begin(self, memory: ServerMemory) -> None:
        """See `FederatedAlgorithm.begin`."""
        super().begin(memory)
        memory.counters[CLIP] = Bound(self.clip)
        self.multipliers(self.expected(memory))

    def clip_of(self, memory: ServerMemory) -> float:
        """C of the coming round."""
        found: float = memory.counters[CLIP].value
        return found

    def columns(self, memory: ServerMemory) -> dict[str, Any]:
        """Also C, where it moves; it is computed from what is protected."""
        found = super().columns(memory)
        return found if self.quantile is None else {**found, CLIP: self.clip_of(memory)}

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """1/m, before clipping."""
        return [1 / self.expected(memory)] * len(replies)

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        bound, expected, noise = self.clip_of(memory), self.expected(memory), self.noise_source(memory)
        multiplier, share_std = self.multipliers(expected)
        norms = [float(reply.delta.double().norm()) for reply in replies]
        clipped = [weight * bound / max(norm, bound) for weight, norm in zip(weights, norms, strict=True)]
        total = weighted_rows([reply.delta for reply in replies], clipped) if replies else torch.zeros_like(model)
        delta = noise.add(total, multiplier * bound / expected, self.name, memory.version)
        if self.quantile is not None:
            within = torch.tensor(sum(0.5 if norm <= bound else -0.5 for norm in norms), dtype=torch.float64)
            share = 0.5 + float(noise.add(within, share_std, self.name, CLIP, memory.version)) / expected
            memory.counters[CLIP].value = bound * math.exp(-self.clip_lr * (share - self.quantile))
        self.ledger(memory).note(ROUND)
        return self.step_along(memory, model, delta)


class Bound:
    """A number that a server remembers.

    Attributes:
        value: Above 0.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It is no number above 0.
        """
        value = state.get("value")
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise StateMismatchError(f"the bound of the updates must be a number above 0, got {value!r}; it is damaged")
        self.value = value
