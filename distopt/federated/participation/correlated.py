"""Probabilities that depend on a client's labels, so that whoever takes part rarely has labels of its own.

Source: Wang & Ji, ICLR 2024 (the paper's experiments).
"""

import numpy as np
from numpy.typing import ArrayLike

from distopt.config import check_number
from distopt.errors import ConfigError
from distopt.federated.participation.base import FloatArray
from distopt.federated.randomness import generator

_CONCENTRATION = 0.1


def correlated_probabilities(
    label_distributions: ArrayLike, *, mean: float = 0.1, minimum: float = 0.02, seed: int = 0
) -> FloatArray:
    """p_n = max(minimum, mean C <labels_n, m>) of client n, at most 1, with one m ~ Dir(0.1) over the C labels.

    The average of p_n is `mean` over the draws of m, where the labels are even over all clients and no bound applies;
    with the bounds it is near it.

    Args:
        label_distributions: (num_clients, num_labels), rows sum to 1, as `label_distributions` of a partition gives.
        mean: The probability that m spreads over the labels, in (0, 1].
        minimum: The least probability, in (0, 1].
        seed: Of m.

    Returns:
        (num_clients,) float64, for `Bernoulli`, `Markov` and `Cyclic`.

    Raises:
        ConfigError: A value breaks its rule, or a row is no distribution.
    """
    check_number("mean", mean, rule="a number in (0, 1]", remedy="the paper uses 0.1", low=0.0, high=1.0)
    check_number("minimum", minimum, rule="a number in (0, 1]", remedy="the paper uses 0.02", low=0.0, high=1.0)
    rows = np.asarray(label_distributions, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ConfigError(
            f"label_distributions must be a matrix (num_clients, num_labels), got shape {rows.shape}; "
            "give one row per client"
        )
    wrong = ~((rows >= 0).all(axis=1) & (np.abs(rows.sum(axis=1) - 1) < 1e-6))
    if wrong.any():
        client = int(wrong.argmax())
        raise ConfigError(
            f"label_distributions must have rows of at least 0 that sum to 1, got a sum of {rows[client].sum():.6g} "
            f"for client {client}; divide its counts by their sum"
        )
    num_labels = rows.shape[1]
    weights = generator(seed, "correlated probabilities").dirichlet(np.full(num_labels, _CONCENTRATION))
    probabilities: FloatArray = np.clip(mean * num_labels * (rows @ weights), minimum, 1.0)
    return probabilities
