"""Federated averaging: rounds between a server and clients that keep their data, come and go."""

from distopt.federated.participation import (
    Bernoulli,
    Cyclic,
    Everybody,
    Markov,
    Participation,
    ParticipationProcess,
    TracedParticipation,
    UniformSampling,
    correlated_probabilities,
)
from distopt.federated.partition import (
    ColumnPartition,
    DirichletPartition,
    IIDPartition,
    NaturalPartition,
    Partition,
    QuantityPartition,
    ShardPartition,
    describe,
    label_counts,
    label_distributions,
)

__all__ = [
    "Bernoulli",
    "ColumnPartition",
    "Cyclic",
    "DirichletPartition",
    "Everybody",
    "IIDPartition",
    "Markov",
    "NaturalPartition",
    "Participation",
    "ParticipationProcess",
    "Partition",
    "QuantityPartition",
    "ShardPartition",
    "TracedParticipation",
    "UniformSampling",
    "correlated_probabilities",
    "describe",
    "label_counts",
    "label_distributions",
]
