"""What a split looks like: how many samples each client has, and of which labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.errors import ConfigError
from distopt.federated.partition.base import IntArray, checked_values


def describe(parts: Sequence[IntArray], labels: Any) -> list[dict[str, Any]]:
    """A row per client in plain values: {"client": 0, "samples": 7, "labels": {0: 5, 3: 2}}, only labels it has.

    Args:
        parts: What `Partition.split` returned.
        labels: (num_samples,) the label of each sample.

    Raises:
        ConfigError: The labels are not 1-D, or a part has an index beyond them.
    """
    distinct, counts = label_counts(parts, labels)
    names = distinct.tolist()
    return [
        {
            "client": client,
            "samples": int(row.sum()),
            "labels": {names[place]: int(row[place]) for place in np.flatnonzero(row).tolist()},
        }
        for client, row in enumerate(counts)
    ]


def label_counts(parts: Sequence[IntArray], labels: Any) -> tuple[NDArray[Any], IntArray]:
    """The distinct labels, (num_labels,) ascending, and (num_clients, num_labels) how often each client has each.

    Raises:
        ConfigError: The labels are not 1-D, or a part has an index beyond them.
    """
    distinct, codes = np.unique(checked_values("labels", labels), return_inverse=True)
    counts: IntArray = np.zeros((len(parts), len(distinct)), dtype=np.int64)
    for client, part in enumerate(parts):
        first, last = (int(np.min(part)), int(np.max(part))) if len(part) else (0, 0)
        if first < 0 or last >= len(codes):
            raise ConfigError(
                f"the samples of a part must be in [0, {len(codes)}), got {first} to {last} for client {client}; "
                "give the labels that were split"
            )
        counts[client] = np.bincount(codes[np.asarray(part, dtype=np.int64)], minlength=len(distinct))
    return distinct, counts


def label_distributions(parts: Sequence[IntArray], labels: Any) -> NDArray[np.float64]:
    """(num_clients, num_labels) which share of a client's samples has each label; even for a client without samples.

    Raises:
        ConfigError: As `label_counts`.
    """
    counts = label_counts(parts, labels)[1]
    sizes = counts.sum(axis=1, keepdims=True)
    even = 1 / counts.shape[1]
    shares: NDArray[np.float64] = np.where(sizes > 0, counts / np.maximum(sizes, 1), even)
    return shares
