"""Asynchronous FedAvg: each reply is aggregated when it comes, with a weight that makes up for how rarely it does.

Fraboni et al., *A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates*, JMLR
2023, 2206.10189:

    x + eta_g (sum_j 1/tau_j) tau_k p_k Delta_k

Delta_k is against the version that the client was sent; tau_k is the time client k takes for a reply. In a long run one
aggregation of (sum_j 1/tau_j) tau_k is client k's, so over time it counts p_k. That number is also the mean of the
aggregations between two of its replies: where nobody knows the times, it is estimated (`ParticipationWeights`).

Limits: the slowest client's weight is about the number of replies that the others give in its time, times p_k: rare and
long steps in a direction that is as many versions old. Lower `server_lr` then, or take FedFix.
"""

from dataclasses import dataclass

from torch import Tensor

from distopt.federated.pacing import AfterArrivals, Pacing
from distopt.federated.reply_times import Timed


@dataclass(frozen=True, kw_only=True)
class AsyncFedAvg(Timed, name="async-fedavg"):
    """Aggregates at each arrival; see the module.

    Args:
        times_s: tau_k, see `Timed`.
        max_staleness: See `TakesOldReplies`.
        weighting: p_k, see `GapWeighted`.
        cutoff: Of the estimate, see `ParticipationWeights`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    @property
    def pacing(self) -> Pacing:
        """See `FederatedAlgorithm.pacing`."""
        return AfterArrivals(count=1)

    def gaps_of(self, times_s: Tensor) -> Tensor:
        """(sum_j 1/tau_j) tau_k."""
        return (1.0 / times_s).sum() * times_s
