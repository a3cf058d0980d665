"""FedFix: the server aggregates at fixed times, whoever has answered by then, and slow clients count more.

Fraboni et al., *A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates*, JMLR
2023, 2206.10189:

    x + eta_g sum over arrivals of ceil(tau_k/Dt) p_k Delta_k

Each Delta_k is against the version that the client was sent. A client of time tau_k is in one aggregation of
ceil(tau_k/Dt), so over time it counts p_k, however slow it is. With Dt of at least the largest tau it is FedAvg. Where
nobody knows the times, ceil(tau_k/Dt) is estimated by FedAU's mean interval between participations
(`ParticipationWeights`), which is the same number for constant times and its mean for random ones.

Limits: unbiased on average over aggregations, not in each; very old deltas point from where the model was, and a Dt far
below the slowest client's time multiplies them by large weights: lower `server_lr` or raise Dt then.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from distopt.config import check_number
from distopt.federated.pacing import EveryInterval, Pacing
from distopt.federated.reply_times import Timed
from distopt.federated.staleness import fedfix_rounds


@dataclass(frozen=True, kw_only=True)
class FedFix(Timed, name="fedfix"):
    """Aggregates every `interval_s`; see the module.

    Args:
        interval_s: Dt, seconds.
        times_s: tau_k, see `Timed`.
        max_staleness: See `TakesOldReplies`.
        weighting: p_k, see `GapWeighted`.
        cutoff: Of the estimate, see `ParticipationWeights`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    interval_s: float  # shorter: more and smaller aggregations, older deltas with larger weights

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "give the seconds between aggregations"
        check_number("interval_s", self.interval_s, rule="a number above 0", remedy=remedy, low=0.0, high=math.inf)

    @property
    def pacing(self) -> Pacing:
        """See `FederatedAlgorithm.pacing`."""
        return EveryInterval(seconds=self.interval_s)

    def gaps_of(self, times_s: Tensor) -> Tensor:
        """ceil(tau_k/Dt)."""
        return fedfix_rounds(times_s, self.interval_s).double()
