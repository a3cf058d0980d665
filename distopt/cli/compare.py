"""`distopt compare`: the same training by dense DDP, by top-k with error feedback and by DGC.

All three go through the same hook, so their bytes and seconds are counted in the same way.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import distopt
from distopt.cli.datasets import Dataset
from distopt.cli.job import Event, Job, launch
from distopt.errors import ConfigError

DENSE, TOPK, DGC = "dense DDP", "top-k + error feedback", "DGC"
_LABELS = {"dense": DENSE, "topk": TOPK, "dgc": DGC}
_EVALUATIONS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the three runs have in common, and the compression of two of them."""

    model: str = "cnn"
    data: str | None = None  # None: the best data set that is installed
    ranks: int = 2
    epochs: int | None = None  # None: 4, or 40 for small data
    steps: int | None = None  # in place of epochs
    batch: int = 32  # per rank
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    density: float = 1e-3  # smaller sends less
    warmup_stage: int | None = None  # steps of each of 4 stages; 0: no warm-up; None: 1% of all steps
    values: str = "fp32"
    indices: str = "int32"
    config: dict[str, Any] | None = None  # an algorithm that takes the place of one; the others compress as it does

    def __post_init__(self) -> None:
        if self.config is not None and self.config["algorithm"] not in ("topk", "dgc"):
            raise ConfigError(
                "distopt compare takes topk or dgc of DDP models from a file, beside dense, got algorithm "
                f"{self.config['algorithm']!r}; leave --config out"
            )
        for algorithm in self.algorithms(steps=100).values():
            distopt.from_config(algorithm)  # raises here what would otherwise be raised by every rank

    def steps_for(self, data: Dataset) -> int:
        """The length of each run in steps."""
        if self.steps is not None:
            return self.steps
        epochs = self.epochs or (4 if len(data.train_labels) >= 10_000 else 40)
        return max(1, epochs * (len(data.train_labels) // (self.ranks * self.batch)))

    def algorithms(self, steps: int) -> dict[str, dict[str, Any]]:
        """The three configurations, by label; the two that compress differ in nothing but the algorithm.

        That of a job's file is as it is there; the other one has what both know of it.
        """
        if self.config is not None:
            return {
                label: {key: value for key, value in self.config.items() if key in _keys(name)} | {"algorithm": name}
                for name, label in _LABELS.items()
            }
        stage = max(1, steps // 100) if self.warmup_stage is None else self.warmup_stage
        compression = {
            "density": self.density,
            "warmup": {"schedule": "paper", "stage": stage} if stage else None,
            "values": self.values,
            "indices": self.indices,
            "exchange": "allgather",  # on one machine "auto" may find that dense is as fast: not what is compared here
        }
        return {
            DENSE: {"algorithm": "dense"},
            TOPK: {"algorithm": "topk", **compression},
            DGC: {"algorithm": "dgc", **compression},
        }

    @property
    def compression(self) -> str:
        """How the compressed runs compress, for people."""
        density = self.density if self.config is None else self.config.get("density", self.density)
        return f"density {density:g}" + ("" if self.config is None else f", as {self.config['algorithm']} in the file")

    def jobs(self, data: Dataset) -> dict[str, Job]:
        """The three runs, by label."""
        steps = self.steps_for(data)
        shared = {
            name: value
            for name, value in asdict(self).items()
            if name in ("model", "data", "ranks", "batch", "lr", "momentum", "weight_decay", "seed")
        }
        every = max(1, steps // _EVALUATIONS)
        return {
            label: Job(algorithm=algorithm, steps=steps, evaluate_every=every, **shared)
            for label, algorithm in self.algorithms(steps).items()
        }


def _keys(algorithm: str) -> set[str]:
    return {field.name for field in distopt.from_config({"algorithm": algorithm}).settings()}


def run(jobs: dict[str, Job], out: Path, *, deadline_s: float, show: Callable[[Event], None]) -> list[dict[str, Any]]:
    """Trains the jobs and gives the figures of each, as `distopt.cli.report` shows them.

    Raises:
        JobError: A rank failed or all together took longer than `deadline_s`.
    """
    curves: dict[str, list[dict[str, Any]]] = {label: [] for label in jobs}

    def on_event(event: Event) -> None:
        if event["event"] == "evaluated":
            curves[event["label"]].append({key: event[key] for key in ("step", "accuracy", "bytes_sent")})
        show(event)

    results = launch(jobs, out, deadline_s=deadline_s, on_event=on_event)
    return [summary(label, job, results[label]) | {"curve": curves[label]} for label, job in jobs.items()]


def summary(label: str, job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """The figures of one finished run: means per step over the whole run, warm-up included, of rank 0."""
    stats = result["stats"]
    steps, last = stats["steps"], stats["last"]
    return {
        "method": label,
        "algorithm": job.algorithm,
        "accuracy": result["accuracy"],
        "parameters": result["parameters"],
        "ranks_identical": result["ranks_identical"],
        "bytes_sent_per_step": stats["bytes_sent"] / steps,
        "bytes_dense_per_step": stats["bytes_dense"] / steps,
        "ratio": stats["bytes_dense"] / stats["bytes_sent"],
        "ratio_last_step": last["bytes_dense"] / last["bytes_sent"],
        "seconds_per_step": result["training_s"] / job.steps,
        "seconds_selecting_per_step": stats["seconds_selecting"] / steps,
        "seconds_communicating_per_step": stats["seconds_communicating"] / steps,
        "stats": stats,
    }
