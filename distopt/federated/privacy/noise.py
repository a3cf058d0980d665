"""Gaussian noise that is never used twice on different values.

Noise that is added to two different values shows their difference: whoever restarts a run with the seed of its noise
gives away what the noise should hide. Here every draw comes from a key, and from a digest of the very values that the
noise is added to. Other values get independent noise, whatever was drawn before; the same values get the same noise,
which is the same release once more and tells nothing new.

The key is 32 bytes of the operating system's, new with each process and in no checkpoint. A simulation that must repeat
to the bit gives a seed, from which the key is made: whoever knows the seed can take the noise away again, so a seeded
run shows what a private one would reach, and is itself not private.

Limits: noise is drawn as float64 and rounded to the values' dtype; what the lowest bits of floating-point noise give
away (Mironov, *On Significance of the Least Significant Bits for Differential Privacy*, CCS 2012) is not hidden.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.config import check_count

_KEY_BYTES = 32


class NoiseSource:
    """Where a job's noise comes from.

    It has a place among the counters of a server's memory, and a state that is empty: a key in a checkpoint would be
    used again.

    Args:
        seed: Of a simulation that repeats to the bit; None takes a key of the operating system's.

    Raises:
        ConfigError: The seed is no integer of at least 0.
    """

    def __init__(self, seed: int | None = None) -> None:
        check_noise_seed(seed)
        self._key = os.urandom(_KEY_BYTES) if seed is None else _key_of(seed)

    def share(self, said_by_leader: Callable[[Callable[[], list[int]]], list[int]]) -> None:
        """Takes the leading process's key, where several compute one server; see `Exchange.said_by_leader`."""
        self._key = bytes(said_by_leader(lambda: list(self._key)))

    def add(self, values: Tensor, std: float, *purpose: object) -> Tensor:
        """Gives values + N(0, std^2 I), not in place; the values themselves where std is 0.

        Args:
            values: Floating point.
            std: Standard deviation, at least 0.
            purpose: What the release is: its name, the round, a client. Two purposes have independent noise.
        """
        if std == 0.0:
            return values
        drawn = self._generator(values, purpose).standard_normal(values.numel())
        noise = torch.from_numpy(drawn).view(values.shape).to(values.device)
        return (values.double() + std * noise).to(values.dtype)

    def _generator(self, values: Tensor, purpose: tuple[object, ...]) -> np.random.Generator:
        digest = hashlib.blake2b(key=self._key, digest_size=_KEY_BYTES)
        digest.update(repr((purpose, str(values.dtype), tuple(values.shape))).encode())
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        words = np.frombuffer(digest.digest(), dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=words[:2], counter=[0, 0, words[2], words[3]]))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps its own key."""


def check_noise_seed(seed: object) -> None:
    """Raises `ConfigError` unless it is None or an integer of at least 0."""
    if seed is not None:
        check_count("noise_seed", seed, low=0, remedy="leave it out, unless a simulation has to repeat to the bit")


def _key_of(seed: int) -> bytes:
    return hashlib.blake2b(f"distopt noise {seed}".encode(), digest_size=_KEY_BYTES).digest()
