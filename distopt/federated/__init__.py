"""Federated averaging: many clients that come and go, one server that adds up what they send."""

from distopt.federated.averaging import sample_weights, uniform_weights, weighted_sum
from distopt.federated.fisher import diagonal_fisher, fisher_average
from distopt.federated.participation_weights import ParticipationWeights
from distopt.federated.robust import bulyan, krum, krum_scores, median, multi_krum, trimmed_mean
from distopt.federated.staleness import (
    async_fedavg_weights,
    fedbuff_weights,
    fedfix_rounds,
    fedfix_weights,
    polynomial_discount,
    synchronous_weights,
)

__all__ = [
    "ParticipationWeights",
    "async_fedavg_weights",
    "bulyan",
    "diagonal_fisher",
    "fedbuff_weights",
    "fedfix_rounds",
    "fedfix_weights",
    "fisher_average",
    "krum",
    "krum_scores",
    "median",
    "multi_krum",
    "polynomial_discount",
    "sample_weights",
    "synchronous_weights",
    "trimmed_mean",
    "uniform_weights",
    "weighted_sum",
]
