"""Federated averaging: many clients that come and go, one server that adds up what they send."""

from distopt.federated.averaging import sample_weights, uniform_weights, weighted_sum
from distopt.federated.fisher import diagonal_fisher, fisher_average
from distopt.federated.participation_weights import ParticipationWeights
from distopt.federated.robust import bulyan, krum, krum_scores, median, multi_krum, trimmed_mean

__all__ = [
    "ParticipationWeights",
    "bulyan",
    "diagonal_fisher",
    "fisher_average",
    "krum",
    "krum_scores",
    "median",
    "multi_krum",
    "sample_weights",
    "trimmed_mean",
    "uniform_weights",
    "weighted_sum",
]
