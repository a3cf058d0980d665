"""Federated averaging: rounds between a server and clients that keep their data, come and go."""

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
