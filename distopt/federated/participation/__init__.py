"""Who takes part in which round: models that a run asks round by round."""

from distopt.federated.participation.base import Participation, ParticipationProcess
from distopt.federated.participation.chances import Bernoulli, Cyclic, Markov
from distopt.federated.participation.correlated import correlated_probabilities
from distopt.federated.participation.sampling import Everybody, UniformSampling
from distopt.federated.participation.traced import TracedParticipation

__all__ = [
    "Bernoulli",
    "Cyclic",
    "Everybody",
    "Markov",
    "Participation",
    "ParticipationProcess",
    "TracedParticipation",
    "UniformSampling",
    "correlated_probabilities",
]
