"""A trace: how long each worker took in each round, at which load, and how much longer a larger load would take.

It is read from CSV or JSON (`distopt.coding.trace_files`). `load` is the fraction of the whole data that each worker
computed per round. `seconds_per_load` is the slope: what the whole data would take one worker; where it is not given,
it is the median of the compute times, divided by the load.

A time at load L is the time at load L0 plus slope * (L - L0), as Krishnan, Ebrahimi & Khisti (ICLR 2023) shift their
profiles.

Limits: one slope for all workers; a worker whose slowness grows with its load is shifted like the others.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.coding.trace_files import read_trace, write_trace
from distopt.config import check_number
from distopt.errors import ConfigError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """Times of workers in rounds, all of which had the same load.

    Attributes:
        seconds: (rounds, workers) float64, from a round's start to the worker's answer; NaN where it never came.
        load: Fraction of the whole data per worker and round, in [0, 1].
        seconds_per_load: The slope, None where it is to be taken from `compute`.
        compute: (rounds, workers) float64, the seconds of computing among `seconds`, or None.

    Raises:
        ConfigError: A value breaks its rule.
    """

    seconds: FloatArray
    load: float
    seconds_per_load: float | None = None
    compute: FloatArray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", _checked_times("seconds", self.seconds))
        if self.load != 0:
            remedy = "give the fraction of the whole data that a worker computed per round, 1/n if uncoded"
            check_number("load", self.load, rule="a number in [0, 1]", remedy=remedy, low=0.0, high=1.0)
        if self.seconds_per_load is not None:
            check_slope(self.seconds_per_load)
        if self.compute is not None:
            object.__setattr__(self, "compute", _checked_times("compute", self.compute))
            if self.compute.shape != self.seconds.shape:
                raise ConfigError(
                    f"compute must have the shape of seconds, {self.seconds.shape}, got {self.compute.shape}; "
                    "give one compute time per answer"
                )

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        return int(self.seconds.shape[0])

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return int(self.seconds.shape[1])

    @property
    def slope(self) -> float:
        """Seconds per unit of load: as given, or from the compute times.

        Raises:
            ConfigError: There is neither.
        """
        if self.seconds_per_load is not None:
            return float(self.seconds_per_load)
        if self.compute is None or self.load == 0 or not np.isfinite(self.compute).any():
            raise ConfigError(
                "seconds_per_load must be known to foresee other loads, and the trace has neither it nor compute times "
                "at a load above 0; add a line `# seconds_per_load = ...`: the seconds that one worker would take "
                "for the whole data"
            )
        return float(np.nanmedian(self.compute)) / self.load

    def at_load(self, load: float | FloatArray, seconds_per_load: float | None = None) -> FloatArray:
        """(rounds, workers) seconds at another load, never below 0; NaN stays.

        Args:
            load: Fraction of the whole data, for all workers or (workers,) for each.
            seconds_per_load: In place of `slope`.
        """
        slope = self.slope if seconds_per_load is None else seconds_per_load
        shifted: FloatArray = np.maximum(self.seconds + slope * (np.asarray(load) - self.load), 0.0)
        return shifted

    def first(self, num_rounds: int) -> "Trace":
        """The trace of its first rounds."""
        return self._taken((slice(0, num_rounds), slice(None)))

    def after(self, num_rounds: int) -> "Trace":
        """The trace of what follows its first rounds."""
        return self._taken((slice(num_rounds, None), slice(None)))

    def reordered(self, workers: NDArray[np.int64]) -> "Trace":
        """The trace with its workers in this order."""
        return self._taken((slice(None), workers))

    def shifted(self, rounds: NDArray[np.int64]) -> "Trace":
        """The trace with each worker's rounds begun at another one: (workers,) which; its first ones come last."""
        places = (np.arange(self.num_rounds)[:, None] + rounds) % self.num_rounds
        return self._taken((places, np.arange(self.num_workers)))

    def _taken(self, part: Any) -> "Trace":
        return Trace(
            seconds=self.seconds[part],
            load=self.load,
            seconds_per_load=self.seconds_per_load,
            compute=None if self.compute is None else self.compute[part],
        )

    @classmethod
    def read(cls, path: str | Path, *, load: float | None = None, seconds_per_load: float | None = None) -> "Trace":
        """The trace in a CSV or JSON file; `load` and `seconds_per_load` in place of what the file says.

        Raises:
            ConfigError: The file cannot be read or is malformed; names the line, the value, the rule and the remedy.
        """
        given = {"load": load, "seconds_per_load": seconds_per_load}
        found = read_trace(Path(path)) | {key: value for key, value in given.items() if value is not None}
        if found.get("load") is None:
            raise ConfigError(
                f"{path}: load must be known, and the trace does not say it; add a line `# load = 0.1` (the fraction "
                "of the whole data that a worker computed per round) or give it beside the file"
            )
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes what `Trace.read` reads: JSON if the name ends in .json, else CSV, long where there is `compute`."""
        settings = {"load": self.load, "seconds_per_load": self.seconds_per_load}
        write_trace(Path(path), settings, self.seconds, self.compute)


def check_slope(value: object) -> None:
    """Raises `ConfigError` unless value is seconds per unit of load, at least 0."""
    if value != 0 or isinstance(value, bool):
        remedy = "give the seconds that one worker would take for the whole data"
        check_number("seconds_per_load", value, rule="a number of at least 0", remedy=remedy, low=0.0, high=math.inf)


def _checked_times(name: str, value: object) -> FloatArray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} must be a matrix of numbers (rounds, workers): {error}; give NaN for none"
        ) from error
    if array.ndim != 2 or 0 in array.shape:
        raise ConfigError(f"{name} must be a matrix (rounds, workers) that is not empty, got shape {array.shape}")
    if (wrong := np.argwhere((array < 0) | np.isinf(array))).size:
        round, worker = wrong[0].tolist()
        raise ConfigError(
            f"{name} must be at least 0 and finite, got {array[round, worker]} of worker {worker} in round {round}; "
            "use nan for an answer that never came"
        )
    if name == "seconds" and np.isnan(array).all():
        raise ConfigError(f"{name} must hold at least one answer, got only nan; record a run in which workers answer")
    array.flags.writeable = False
    return array
