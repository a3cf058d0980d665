"""Federated averaging: rounds between a server and clients that keep their data, come and go."""

from distopt.federated.algorithm import FederatedAlgorithm, LocalRound
from distopt.federated.average_all import AverageAll
from distopt.federated.averaging import sample_weights, uniform_weights, weighted_sum
from distopt.federated.client import Client
from distopt.federated.clock import Arrival, VirtualClock
from distopt.federated.delays import (
    ConstantDelays,
    DelayProcess,
    Delays,
    ExponentialDelays,
    HeavyTailedDelays,
    TracedDelays,
    UniformDelays,
)
from distopt.federated.deltas import SummedDeltas
from distopt.federated.fedau import FedAU
from distopt.federated.fedavg import FedAvg
from distopt.federated.feddyn import FedDyn
from distopt.federated.fednova import FedNova
from distopt.federated.fedprox import FedProx
from distopt.federated.fedspeed import FedSpeed
from distopt.federated.fedvarp import FedVarp
from distopt.federated.known_participation import KnownParticipation
from distopt.federated.layout import Layout
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.mifa import MIFA
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
from distopt.federated.participation_weights import ParticipationWeights
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
from distopt.federated.robust import bulyan, krum, krum_scores, median, multi_krum, trimmed_mean
from distopt.federated.scaffold import Scaffold
from distopt.federated.server import Server, ServerState
from distopt.federated.server_optimizer import (
    PlainStep,
    ServerAdagrad,
    ServerAdam,
    ServerMomentum,
    ServerOptimizer,
    ServerYogi,
)

__all__ = [
    "MIFA",
    "Arrival",
    "AverageAll",
    "Bernoulli",
    "Broadcast",
    "Client",
    "ColumnPartition",
    "ConstantDelays",
    "Cyclic",
    "DelayProcess",
    "Delays",
    "DirichletPartition",
    "Everybody",
    "ExponentialDelays",
    "FedAU",
    "FedAvg",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedSpeed",
    "FedVarp",
    "FederatedAlgorithm",
    "HeavyTailedDelays",
    "IIDPartition",
    "KnownParticipation",
    "Layout",
    "LocalRound",
    "Markov",
    "NaturalPartition",
    "Participation",
    "ParticipationProcess",
    "ParticipationWeights",
    "Partition",
    "PlainStep",
    "QuantityPartition",
    "Reply",
    "Scaffold",
    "Server",
    "ServerAdagrad",
    "ServerAdam",
    "ServerMomentum",
    "ServerOptimizer",
    "ServerState",
    "ServerYogi",
    "ShardPartition",
    "SummedDeltas",
    "TracedDelays",
    "TracedParticipation",
    "UniformDelays",
    "UniformSampling",
    "VirtualClock",
    "bulyan",
    "correlated_probabilities",
    "describe",
    "krum",
    "krum_scores",
    "label_counts",
    "label_distributions",
    "median",
    "multi_krum",
    "sample_weights",
    "trimmed_mean",
    "uniform_weights",
    "weighted_sum",
]
