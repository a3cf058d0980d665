"""Federated averaging: rounds between a server and clients that keep their data, come and go."""

from distopt.federated.algorithm import FederatedAlgorithm, LinearAlgorithm, LocalRound, WeightedSum
from distopt.federated.async_fedavg import AsyncFedAvg
from distopt.federated.average_all import AverageAll
from distopt.federated.client import Client
from distopt.federated.client_weights import sample_weights, uniform_weights
from distopt.federated.clock import Arrival, VirtualClock
from distopt.federated.data import ClientData
from distopt.federated.delays import (
    ConstantDelays,
    DelayProcess,
    Delays,
    ExponentialDelays,
    HeavyTailedDelays,
    TracedDelays,
    UniformDelays,
)
from distopt.federated.deltas import SteppingServer, SummedDeltas
from distopt.federated.diff2 import DIFF2
from distopt.federated.dp_fedavg import DPFedAvg
from distopt.federated.dp_gd import DPGD
from distopt.federated.fedasync import FedAsync
from distopt.federated.fedau import FedAU
from distopt.federated.fedavg import FedAvg
from distopt.federated.fedbuff import FedBuff
from distopt.federated.feddyn import FedDyn
from distopt.federated.fedfix import FedFix
from distopt.federated.fednova import FedNova
from distopt.federated.fedprox import FedProx
from distopt.federated.fedspeed import FedSpeed
from distopt.federated.fedvarp import FedVarp
from distopt.federated.fisher import diagonal_fisher, fisher_average
from distopt.federated.fisher_averaging import FisherAveraging
from distopt.federated.history import History
from distopt.federated.known_participation import KnownParticipation
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.mifa import MIFA
from distopt.federated.network import Attendance, Service, launched_rank, serve, take_part
from distopt.federated.pacing import AfterArrivals, EveryInterval, Pacing, Synchronous
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
from distopt.federated.plots import plot_histories
from distopt.federated.progress import ProgressBar
from distopt.federated.robust import bulyan, krum, krum_scores, median, multi_krum, trimmed_mean
from distopt.federated.robust_averages import Bulyan, Krum, Median, MultiKrum, RobustAverage, TrimmedMean
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
from distopt.federated.simulation import Simulation
from distopt.federated.staleness import (
    async_fedavg_weights,
    fedbuff_weights,
    fedfix_rounds,
    fedfix_weights,
    polynomial_discount,
    synchronous_weights,
)
from distopt.federated.tensorboard import TensorBoard
from distopt.federated.uplink import UplinkCompression

__all__ = [
    "DIFF2",
    "DPGD",
    "MIFA",
    "AfterArrivals",
    "Arrival",
    "AsyncFedAvg",
    "Attendance",
    "AverageAll",
    "Bernoulli",
    "Broadcast",
    "Bulyan",
    "Client",
    "ClientData",
    "ColumnPartition",
    "ConstantDelays",
    "Cyclic",
    "DPFedAvg",
    "DelayProcess",
    "Delays",
    "DirichletPartition",
    "EveryInterval",
    "Everybody",
    "ExponentialDelays",
    "FedAU",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedDyn",
    "FedFix",
    "FedNova",
    "FedProx",
    "FedSpeed",
    "FedVarp",
    "FederatedAlgorithm",
    "FisherAveraging",
    "HeavyTailedDelays",
    "History",
    "IIDPartition",
    "KnownParticipation",
    "Krum",
    "Layout",
    "LinearAlgorithm",
    "LocalRound",
    "LocalTraining",
    "Markov",
    "Median",
    "MultiKrum",
    "NaturalPartition",
    "Pacing",
    "Participation",
    "ParticipationProcess",
    "ParticipationWeights",
    "Partition",
    "PlainStep",
    "ProgressBar",
    "QuantityPartition",
    "Reply",
    "RobustAverage",
    "Scaffold",
    "Server",
    "ServerAdagrad",
    "ServerAdam",
    "ServerMomentum",
    "ServerOptimizer",
    "ServerState",
    "ServerYogi",
    "Service",
    "ShardPartition",
    "Simulation",
    "SteppingServer",
    "SummedDeltas",
    "Synchronous",
    "TensorBoard",
    "TracedDelays",
    "TracedParticipation",
    "TrimmedMean",
    "UniformDelays",
    "UniformSampling",
    "UplinkCompression",
    "VirtualClock",
    "WeightedSum",
    "async_fedavg_weights",
    "bulyan",
    "correlated_probabilities",
    "describe",
    "diagonal_fisher",
    "fedbuff_weights",
    "fedfix_rounds",
    "fedfix_weights",
    "fisher_average",
    "krum",
    "krum_scores",
    "label_counts",
    "label_distributions",
    "launched_rank",
    "median",
    "multi_krum",
    "plot_histories",
    "polynomial_discount",
    "sample_weights",
    "serve",
    "synchronous_weights",
    "take_part",
    "trimmed_mean",
    "uniform_weights",
]
