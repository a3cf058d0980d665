"""No all-reduce and no coordinator: average with neighbours only."""

from distopt.gossip.asynchronous_simulation import AsynchronousHistory, simulate_asynchronous
from distopt.gossip.attachment import GossipAttachment
from distopt.gossip.codec import Codec, SignCodec, TopKCodec
from distopt.gossip.configuration import Gossip
from distopt.gossip.dadao import DadaoHistory, edge_rates, simulate_dadao
from distopt.gossip.dadao_on_ranks import run_dadao
from distopt.gossip.description import Description, describe
from distopt.gossip.graph import Graph
from distopt.gossip.mixing import (
    DPSGD,
    A2CiD2,
    Choco,
    GradientTracking,
    Mixing,
    NoLoCo,
    PushSum,
    QuasiGlobalMomentum,
)
from distopt.gossip.node_batches import NodeBatches
from distopt.gossip.optimal_rates import optimal_edge_rates
from distopt.gossip.simulation import GossipHistory, simulate
from distopt.gossip.tensorboard import TensorBoard
from distopt.gossip.topologies import (
    Complete,
    EdgeList,
    ErdosRenyi,
    Exponential,
    OnePeerExponential,
    RandomMatchings,
    RandomRegular,
    Ring,
    ScaleFree,
    Star,
    Torus,
    Weighted,
)
from distopt.gossip.topology import Topology
from distopt.gossip.variance import variance_corrected

__all__ = [
    "DPSGD",
    "A2CiD2",
    "AsynchronousHistory",
    "Choco",
    "Codec",
    "Complete",
    "DadaoHistory",
    "Description",
    "EdgeList",
    "ErdosRenyi",
    "Exponential",
    "Gossip",
    "GossipAttachment",
    "GossipHistory",
    "GradientTracking",
    "Graph",
    "Mixing",
    "NoLoCo",
    "NodeBatches",
    "OnePeerExponential",
    "PushSum",
    "QuasiGlobalMomentum",
    "RandomMatchings",
    "RandomRegular",
    "Ring",
    "ScaleFree",
    "SignCodec",
    "Star",
    "TensorBoard",
    "TopKCodec",
    "Topology",
    "Torus",
    "Weighted",
    "describe",
    "edge_rates",
    "optimal_edge_rates",
    "run_dadao",
    "simulate",
    "simulate_asynchronous",
    "simulate_dadao",
    "variance_corrected",
]
