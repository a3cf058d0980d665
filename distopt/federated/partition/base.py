"""What every partitioner promises: each sample goes to exactly one client, and the same seed gives the same split.

A partitioner only says who owns each sample; the lists of indices are made of that here, so no partitioner can lose a
sample or give it away twice.
"""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distopt.config import Configurable, check_count
from distopt.errors import ConfigError
from distopt.federated.randomness import generator

IntArray = NDArray[np.int64]


class Partition(Configurable, tag="partition"):
    """Base of the partitioners, which share the samples of a data set out to clients."""

    def split(self, labels: Any, num_clients: int | None = None, seed: int = 0) -> list[IntArray]:
        """The samples of each client.

        Args:
            labels: (num_samples,) the label of each sample, as an array, a tensor or a list. `natural` takes the id of
                each sample's owner in its place, `column` a table.
            num_clients: How many to share out to; None only where the data say it (`natural`, `column`).
            seed: The same seed gives the same split.

        Returns:
            One int64 array per client: indices of its samples, ascending; each index is in exactly one of them.

        Raises:
            ConfigError: There are no labels, they are not 1-D, or they cannot be shared out to so many clients.
        """
        values = self._values(labels)
        number = self._number_of_clients(values, num_clients)
        owners = self._owners(values, number, generator(seed, f"partition {self.name}"))
        order = np.argsort(owners, kind="stable")
        ends = np.cumsum(np.bincount(owners, minlength=number))
        return [part.astype(np.int64, copy=False) for part in np.split(order, ends[:-1])]

    @abstractmethod
    def _owners(self, values: NDArray[Any], num_clients: int, rng: np.random.Generator) -> IntArray:
        """(num_samples,) the client that each sample goes to."""

    def _values(self, labels: Any) -> NDArray[Any]:
        return checked_values("labels", labels)

    def _number_of_clients(self, values: NDArray[Any], num_clients: int | None) -> int:
        check_count("num_clients", num_clients, low=1, remedy="give the number of clients")
        assert num_clients is not None
        if num_clients > len(values):
            raise ConfigError(
                f"num_clients must be at most the number of samples, {len(values)}, got {num_clients}; "
                "take fewer clients or more samples"
            )
        return num_clients


def checked_values(name: str, values: Any) -> NDArray[Any]:
    """One value per sample, as an array.

    Raises:
        ConfigError: They are not 1-D, there are none, one is NaN, or they cannot be put in an order.
    """
    remedy = "give one label or id per sample"
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be 1-D, got values that make no array: {error}; {remedy}") from error
    if array.ndim != 1:
        raise ConfigError(f"{name} must be 1-D, got shape {array.shape}; {remedy}")
    if array.size == 0:
        raise ConfigError(f"{name} must hold at least one sample, got none; {remedy}")
    if array.dtype.kind in "fc" and np.isnan(array).any():
        raise ConfigError(f"{name} must not hold nan, got it for sample {int(np.isnan(array).argmax())}; {remedy}")
    if array.dtype.kind == "O":
        try:
            np.unique(array)
        except TypeError as error:
            raise ConfigError(
                f"{name} must be values of one kind: {error}; {remedy}, all numbers or all text"
            ) from error
    return array


def equal_sizes(num_samples: int, num_clients: int) -> IntArray:
    """(num_clients,) sizes that differ by at most one, the larger ones first."""
    sizes: IntArray = np.full(num_clients, num_samples // num_clients, dtype=np.int64)
    sizes[: num_samples % num_clients] += 1
    return sizes


def check_minimum(min_samples: int, num_samples: int, num_clients: int) -> None:
    """Raises `ConfigError` where there are not enough samples for every client to have `min_samples`."""
    if min_samples * num_clients > num_samples:
        raise ConfigError(
            f"min_samples must be at most {num_samples // num_clients} for {num_clients} clients and {num_samples} "
            f"samples, got {min_samples}; lower it or take fewer clients"
        )
