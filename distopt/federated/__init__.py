"""Federated averaging: many clients that come and go, one server that adds up what they send."""

from distopt.federated.averaging import sample_weights, uniform_weights, weighted_sum
from distopt.federated.participation_weights import ParticipationWeights

__all__ = ["ParticipationWeights", "sample_weights", "uniform_weights", "weighted_sum"]
