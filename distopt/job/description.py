"""A job described once: which algorithm, where its checkpoints lie, what is logged.

`Job.load("distopt.toml").attach(model, optimizer)` does what it says (see `distopt.job.run`).

The same description is written as `distopt.toml` (or JSON), as the block "distopt" of a DeepSpeed config, or as a plain
mapping: the algorithm's own keys, and beside them the tables `checkpoint`, `log` and `batch`::

    algorithm = "dgc"
    density = 0.001

    [checkpoint]
    folder = "runs/job/checkpoints"

    [log]
    folder = "runs/job/log"

    [batch]
    test = "norm"
    eta = 0.2
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from distopt.batch import AdaptiveBatch
from distopt.config import Algorithm, Configurable, check_count, check_switch
from distopt.errors import ConfigError

if TYPE_CHECKING:
    from distopt.job.checkpoint_folder import Part
    from distopt.job.run import Run

JobSource: TypeAlias = "Job | Algorithm | Mapping[str, Any] | str | os.PathLike[str]"

_Settings = TypeVar("_Settings", bound=Configurable)

_READERS = {".toml": tomllib.loads, ".json": json.loads}


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Configurable, tag="checkpoint", name="checkpoint"):
    """Where checkpoints are kept, and how often one is made.

    Raises:
        ConfigError: A value breaks its rule.
    """

    folder: str = "runs/job/checkpoints"  # every rank reads and writes it
    every: int = 500  # steps: smaller loses less when the job is killed
    keep: int = 2  # the newest so many; more of them take more room

    def __post_init__(self) -> None:
        _check_folder("folder of checkpoint", self.folder)
        check_count("every of checkpoint", self.every, low=1, remedy="use 500 for one checkpoint in 500 steps")
        check_count("keep of checkpoint", self.keep, low=1, remedy="use 2 to keep the newest two")


@dataclass(frozen=True, kw_only=True)
class LogSettings(Configurable, tag="log", name="log"):
    """What is written about a run.

    Raises:
        ConfigError: A value breaks its rule.
    """

    folder: str = "runs/job/log"  # rank r writes stats-r.jsonl into it
    every: int = 50  # steps: smaller shows more and costs more
    tensorboard: bool = False  # True: events too, which needs the extra `tensorboard`
    report: bool = True  # a text at the end of the run

    def __post_init__(self) -> None:
        _check_folder("folder of log", self.folder)
        check_count("every of log", self.every, low=1, remedy="use 50 for one line in 50 steps")
        check_switch("tensorboard of log", self.tensorboard)
        check_switch("report of log", self.report)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `distopt.toml` says.

    Attributes:
        algorithm: The configuration to attach.
        checkpoint: Where its state is kept; None where the job does not say.
        log: What is written about the run; None for nothing.
        batch: How the batch grows; None leaves it to the loader.
    """

    algorithm: Algorithm
    checkpoint: CheckpointSettings | None = None
    log: LogSettings | None = None
    batch: AdaptiveBatch | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, type[Configurable]] = {"algorithm": Algorithm, **_TABLES}
        for field, kind in kinds.items():
            value = getattr(self, field)
            if not isinstance(value, kind) and (value is not None or field == "algorithm"):
                raise ConfigError(
                    f"{field} of a job must be of {kind.__name__}, got {value!r}; Job.load makes it of plain values"
                )

    @classmethod
    def load(cls, source: JobSource) -> Self:
        """The job that a TOML or JSON file, a mapping, an algorithm or a job describes.

        Raises:
            ConfigError: The file cannot be read, a name or key is unknown, or a value breaks its rule; names the file.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, Algorithm):
            return cls(algorithm=source)
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            try:
                return cls._from_mapping(_read(path))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error
        if isinstance(source, Mapping):
            return cls._from_mapping(source)
        raise ConfigError(
            f"a job must be a mapping, a file, an algorithm or a distopt.Job, got {type(source).__name__}; "
            'use {"algorithm": "dgc", "density": 0.001} or "distopt.toml"'
        )

    @classmethod
    def _from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        rest = dict(mapping)
        tables = {name: rest.pop(name, None) for name in _TABLES}
        return cls(
            algorithm=Algorithm.from_dict(rest),
            checkpoint=_table(CheckpointSettings, tables["checkpoint"]),
            log=_table(LogSettings, tables["log"]),
            batch=_table(AdaptiveBatch, tables["batch"]),
        )

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: "Part | None" = None,
        scaler: Any = None,
        process_group: dist.ProcessGroup | None = None,
        parts: "Mapping[str, Part] | None" = None,
        loader: Any = None,
        **options: Any,
    ) -> "Run":
        """Attaches the algorithm, goes on from the newest checkpoint and begins the log, as the job says. Collective.

        Args:
            model: A DDP model for the ddp family, else the bare one.
            optimizer: Its optimizer.
            scheduler: Of the learning rate, if there is one; it belongs to the checkpoints.
            scaler: The `torch.amp.GradScaler` in use, if any; likewise.
            process_group: The ranks to exchange with; the algorithm's default otherwise.
            parts: What else belongs to the checkpoints, by name: anything with `state_dict` and `load_state_dict`.
            loader: Whose batch is to grow, for a job with a table `batch`: see `distopt.AdaptiveBatch.attach`. Where it
                stands in its epoch belongs to the checkpoints then.
            options: What the algorithm's own `attach` takes besides: `batches` of coded training, say.

        Raises:
            CompatibilityError: The algorithm is federated, or does not fit the model or optimizer; a part has no state.
            StateMismatchError: The checkpoint is of another model, optimizer or algorithm.
            ConfigError: A folder cannot be written, a part has a name that is taken, an option is unknown, or of a
                table `batch` and a loader only one is given.
        """
        from distopt.job.run import Run  # which brings the families, and they need no job

        own = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        for name, part in (parts or {}).items():
            if name in own or name in ("distopt", "batch"):
                raise ConfigError(
                    f"parts must have names of their own, got {type(part).__name__} as {name!r}; use "
                    "parts={'averaged': averaged_model}"
                )
        if (self.batch is None) != (loader is None):
            found = "a loader and no table batch" if self.batch is None else "a table batch and no loader"
            raise ConfigError(
                f"a batch that grows needs a table batch in the job and the loader at attach, got {found}; give both "
                "or neither"
            )
        kept = {name: part for name, part in {**own, **(parts or {})}.items() if part is not None}
        given = {"scaler": scaler, "process_group": process_group, **options}
        return Run(
            self,
            model,
            optimizer,
            parts=kept,
            options={name: each for name, each in given.items() if each is not None},
            loader=loader,
        )

    def to_dict(self) -> dict[str, Any]:
        """This job as plain values that JSON and TOML can hold; `load` makes an equal job of it."""
        plain = self.algorithm.to_dict()
        for settings in (self.checkpoint, self.log, self.batch):
            if settings is not None:
                table = settings.to_dict()
                plain[table.pop(settings.tag)] = table
        return plain


_TABLES: dict[str, type[Configurable]] = {kind.tag: kind for kind in (CheckpointSettings, LogSettings, AdaptiveBatch)}


def from_config(source: JobSource) -> Algorithm:
    """The algorithm that a JSON, TOML or DeepSpeed block describes: `{"algorithm": "dgc", "density": 0.001}`.

    Args:
        source: The block, or the path of a `.toml` or `.json` file with its keys. The tables `checkpoint`, `log`
            and `batch` of a whole job may stand beside them and are checked; `Job.load` returns them too.

    Raises:
        ConfigError: The algorithm or a key is unknown, or a value breaks its rule.
    """
    return Job.load(source).algorithm


def _table(kind: type[_Settings], table: object) -> _Settings | None:
    if table is None:
        return None
    if not isinstance(table, Mapping):
        remedy = '{"test": "norm"}' if kind is AdaptiveBatch else '{"folder": "runs/job"}'
        raise ConfigError(f"{kind.tag} must be a table, got {table!r}; use {remedy}")
    return kind.from_dict({kind.tag: kind.name, **table})


def _read(path: Path) -> Mapping[str, Any]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ConfigError(
            f"a job's file must end in {' or '.join(_READERS)}, got {path.name!r}; rename it, or, if it is the name "
            'of an algorithm, write {"algorithm": "dgc"}'
        )
    try:
        content = reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the file cannot be read ({error.strerror}); give the path of a job's file") from error
    except ValueError as error:  # of both formats, and of bytes that are not UTF-8
        raise ConfigError(f"the file must be {path.suffix[1:].upper()}, got {error}; correct it there") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"the file must hold a mapping, got {type(content).__name__}; write the algorithm's keys")
    return content


def _check_folder(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f'{field} must be the name of a folder, got {value!r}; use "runs/job"')
