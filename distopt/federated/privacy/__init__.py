"""Differential privacy: per-sample gradients, noise, what it costs, and what a job must be for that to hold."""

from distopt.federated.privacy.accountant import Releases, epsilon_of, smallest_multiplier
from distopt.federated.privacy.calibration import Noise, Plan, calibrated
from distopt.federated.privacy.per_sample import clipped_sum

__all__ = ["Noise", "Plan", "Releases", "calibrated", "clipped_sum", "epsilon_of", "smallest_multiplier"]
