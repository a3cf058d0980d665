"""How the samples of a data set are shared out to clients: partitioners, and what a split looks like."""

from distopt.federated.partition.base import Partition
from distopt.federated.partition.description import describe, label_counts, label_distributions
from distopt.federated.partition.groups import ColumnPartition, NaturalPartition
from distopt.federated.partition.labels import DirichletPartition, ShardPartition
from distopt.federated.partition.sizes import IIDPartition, QuantityPartition

__all__ = [
    "ColumnPartition",
    "DirichletPartition",
    "IIDPartition",
    "NaturalPartition",
    "Partition",
    "QuantityPartition",
    "ShardPartition",
    "describe",
    "label_counts",
    "label_distributions",
]
