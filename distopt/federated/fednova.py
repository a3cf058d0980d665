"""FedNova: each client's delta counts per local step, so that who takes more steps does not pull harder.

Wang et al., *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, NeurIPS 2020:

    x + eta_g tau_eff sum_k p_k Delta_k / tau_k,  tau_eff = sum_k p_k tau_k

with p_k = n_k / sum of n_k, or the same for all, and tau_k the local steps of client k.

Limits: tau_k counts steps of plain SGD; local momentum or a pull to the start would need other norms of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.federated.fedavg import FedAvg
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply


@dataclass(frozen=True, kw_only=True)
class FedNova(FedAvg, name="fednova"):
    """FedAvg of deltas per local step, times the mean number of steps; the same as FedAvg where all take as many.

    Args:
        weighting: p_k, see `FedAvg`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    assumes_plain_sgd = True

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        shares = super().weights(memory, replies)
        effective = sum(share * reply.num_steps for share, reply in zip(shares, replies, strict=True))
        return [effective * share / reply.num_steps for share, reply in zip(shares, replies, strict=True)]
