"""Who talks to whom: fixed graphs, graphs that change by round, random ones, and your own."""

from distopt.gossip.topologies.exponential import Exponential, OnePeerExponential
from distopt.gossip.topologies.fixed import Complete, Ring, Star, Torus
from distopt.gossip.topologies.given import EdgeList, Weighted
from distopt.gossip.topologies.matchings import RandomMatchings
from distopt.gossip.topologies.random_graphs import ErdosRenyi, RandomRegular, ScaleFree

__all__ = [
    "Complete",
    "EdgeList",
    "ErdosRenyi",
    "Exponential",
    "OnePeerExponential",
    "RandomMatchings",
    "RandomRegular",
    "Ring",
    "ScaleFree",
    "Star",
    "Torus",
    "Weighted",
]
