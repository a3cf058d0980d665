"""Partitions by label, in which clients see some labels often and others never.

Sources: McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017,
section 3 (shards of the data sorted by label); Yurochkin et al., *Bayesian Nonparametric Federated Learning of Neural
Networks*, ICML 2019 (each label shared out by a Dirichlet draw over clients); Hsu et al., *Measuring the Effects of
Non-Identical Data Distribution*, 2019 (each client's labels a Dirichlet draw, sizes equal).

Limits: a client by label matrix of counts is held in memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.config import check_choice, check_count
from distopt.errors import ConfigError
from distopt.federated.partition.base import IntArray, Partition, check_minimum, equal_sizes
from distopt.federated.partition.sizes import check_alpha


@dataclass(frozen=True, kw_only=True)
class DirichletPartition(Partition, name="dirichlet"):
    """Label distributions drawn from a Dirichlet distribution.

    `sizes="uneven"`: each label's samples are shared out to the clients by one draw of Dir(alpha) over clients, so
    sizes differ too, and clients may be left without data. Clients with fewer than `min_samples` are then filled up:
    every client keeps `min_samples` of its samples, chosen at random, and what is missing elsewhere is drawn evenly
    from all the rest. This makes the filled clients more like the average.

    `sizes="equal"`: sizes differ by at most one, and each client's labels are drawn from a Dir(alpha) of its own. A
    label that has run out is drawn no more, so clients that come late (the order is random) get what is left.

    Raises:
        ConfigError: A value breaks its rule.
    """

    alpha: float = 0.5  # smaller gives each client fewer labels; 100 is nearly IID
    sizes: str = "uneven"  # "equal" makes each client's mixture of labels a draw of its own
    min_samples: int = 0  # larger moves more samples to the clients with few

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_choice("sizes", self.sizes, ("uneven", "equal"))
        check_count("min_samples", self.min_samples, low=0, remedy="use 1 so that nobody is without data")

    def _owners(self, values: NDArray[Any], num_clients: int, rng: np.random.Generator) -> IntArray:
        check_minimum(self.min_samples, len(values), num_clients)
        codes = np.unique(values, return_inverse=True)[1]
        totals = np.bincount(codes).astype(np.int64)
        counts = (self._uneven if self.sizes == "uneven" else self._equal)(totals, num_clients, rng)
        owners: IntArray = np.empty(len(values), dtype=np.int64)
        members = np.split(np.argsort(codes, kind="stable"), np.cumsum(totals)[:-1])
        for label, samples in enumerate(members):
            owners[rng.permutation(samples)] = np.repeat(np.arange(num_clients), counts[:, label])
        return _filled_up(owners, num_clients, self.min_samples, rng)

    def _uneven(self, totals: IntArray, num_clients: int, rng: np.random.Generator) -> IntArray:
        """(num_clients, num_labels) counts: the draw of each label cuts its samples into pieces."""
        shares = rng.dirichlet(np.full(num_clients, self.alpha), size=len(totals)).T
        ends = np.rint(np.cumsum(shares, axis=0) * totals).astype(np.int64)
        ends[-1] = totals
        return np.diff(ends, axis=0, prepend=0)

    def _equal(self, totals: IntArray, num_clients: int, rng: np.random.Generator) -> IntArray:
        """(num_clients, num_labels) counts: the draw of each client, as far as the labels last."""
        left = totals.copy()
        counts: IntArray = np.zeros((num_clients, len(totals)), dtype=np.int64)
        order = rng.permutation(num_clients)
        for client, size in zip(order, equal_sizes(int(totals.sum()), num_clients).tolist(), strict=True):
            mixture = rng.dirichlet(np.full(len(totals), self.alpha))
            missing = size
            while missing:  # ends: each turn completes the client or uses a label up
                weights = np.where(left > 0, mixture, 0.0)
                if weights.sum() == 0:
                    weights = left.astype(np.float64)
                drawn = np.minimum(rng.multinomial(missing, weights / weights.sum()), left)
                counts[client] += drawn
                left -= drawn
                missing -= int(drawn.sum())
        return counts


@dataclass(frozen=True, kw_only=True)
class ShardPartition(Partition, name="shards"):
    """The data sorted by label, cut into shards of equal size (to within one), and dealt to the clients at random.

    With 2 shards per client most clients see two labels, the pathological split of McMahan et al.

    Raises:
        ConfigError: A value breaks its rule.
    """

    shards_per_client: int = 2  # fewer gives each client fewer labels

    def __post_init__(self) -> None:
        check_count("shards_per_client", self.shards_per_client, low=1, remedy="the paper uses 2")

    def _owners(self, values: NDArray[Any], num_clients: int, rng: np.random.Generator) -> IntArray:
        num_shards = num_clients * self.shards_per_client
        if num_shards > len(values):
            raise ConfigError(
                f"shards_per_client must be at most {len(values) // num_clients} for {num_clients} clients and "
                f"{len(values)} samples, got {self.shards_per_client}; lower it or take fewer clients"
            )
        clients = rng.permutation(np.repeat(np.arange(num_clients, dtype=np.int64), self.shards_per_client))
        owners: IntArray = np.empty(len(values), dtype=np.int64)
        owners[np.argsort(values, kind="stable")] = np.repeat(clients, equal_sizes(len(values), num_shards))
        return owners


def _filled_up(owners: IntArray, num_clients: int, min_samples: int, rng: np.random.Generator) -> IntArray:
    """Owners such that every client has at least `min_samples`; see `DirichletPartition` for who gives."""
    sizes = np.bincount(owners, minlength=num_clients)
    missing = np.maximum(min_samples - sizes, 0)
    if not missing.any():
        return owners
    order = rng.permutation(len(owners))
    by_client = order[np.argsort(owners[order], kind="stable")]
    place = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a sample within its client
    given = rng.choice(by_client[place >= min_samples], int(missing.sum()), replace=False)
    filled = owners.copy()
    filled[given] = np.repeat(np.arange(num_clients), missing)
    return filled
