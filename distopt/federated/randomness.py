"""Random numbers that a run can repeat: one generator per purpose, and its state as plain values.

Two purposes of one seed have streams of their own, so drawing more for the one does not change the other.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from distopt.config import check_count
from distopt.errors import StateMismatchError


def check_seed(seed: object) -> None:
    """Raises `ConfigError` unless seed is an integer of at least 0."""
    check_count("seed", seed, low=0, remedy="give one number per run; the same number repeats the run")


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose: the same seed and purpose give the same numbers.

    Raises:
        ConfigError: The seed is no integer of at least 0.
    """
    check_seed(seed)
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()),))
    return np.random.Generator(np.random.PCG64(sequence))


def stream_key(seed: int, purpose: str) -> list[int]:
    """Two 64-bit integers that name the streams of one purpose, for `stream`.

    Raises:
        ConfigError: The seed is no integer of at least 0.
    """
    check_seed(seed)
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()),))
    words: list[int] = sequence.generate_state(2, np.uint64).tolist()
    return words


def stream(key: list[int], first: int, second: int) -> np.random.Generator:
    """The generator of a pair of numbers, whatever was drawn before: it has no state to keep."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, first, second]))


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """Where the generator is in its stream, as nested dicts of integers and names, which JSON can hold."""
    return dict(rng.bit_generator.state)


def load_generator_state(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    """Puts the generator where `generator_state` found one.

    Raises:
        StateMismatchError: The state is not one of such a generator.
    """
    try:
        rng.bit_generator.state = state
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise StateMismatchError(
            f"the state of a generator must be what state_dict() gave, got {state!r:.200}; save again"
        ) from error
