"""FedAU: clients that come rarely count more, by an estimate of how rarely that the server makes as it goes.

Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*, ICLR 2024,
2306.03401:

    x + eta_g (1/N) sum_S omega_k Delta_k

divided by all N registered clients, never by how many replied. omega_k estimates 1/p_k, see `ParticipationWeights`. The
objective is the uniform mean over clients; for the one over samples omega_k is multiplied by N q_k, where q_k is the
client's share of all samples.

Limits: those of `GapWeighted`. A round in which nobody replies counts as a round without participation.
"""

from dataclasses import dataclass

from distopt.federated.gap_weights import GapWeighted


@dataclass(frozen=True, kw_only=True)
class FedAU(GapWeighted, name="fedau"):
    """Unbiased whoever takes part more often than others; see the module.

    Args:
        cutoff: K, see `ParticipationWeights`.
        weighting: "uniform", the objective is the mean over clients; "samples", that over samples.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """
