"""Averages that some clients may try to spoil: rules that bear a number of arbitrary replies."""

from distopt.federated.robust.bulyan import bulyan
from distopt.federated.robust.coordinate_wise import median, trimmed_mean
from distopt.federated.robust.krum import krum, krum_scores, multi_krum

__all__ = ["bulyan", "krum", "krum_scores", "median", "multi_krum", "trimmed_mean"]
