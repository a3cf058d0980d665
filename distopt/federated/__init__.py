"""Federated averaging: many clients that come and go, one server that adds up what they send."""

from distopt.federated.participation_weights import ParticipationWeights

__all__ = ["ParticipationWeights"]
