"""The block "distopt" of a ds_config: taken out and read here, since DeepSpeed ignores keys that it does not know."""

import base64
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from distopt.config import check_number, check_switch
from distopt.ddp.algorithm import DDPAlgorithm
from distopt.errors import CompatibilityError, ConfigError
from distopt.job import Job, JobSource

KEY = "distopt"


@dataclass(frozen=True, kw_only=True)
class Block:
    """What the block says.

    Attributes:
        job: The algorithm, with the tables `checkpoint` and `log`.
        overlap: Whether DistributedDataParallel sends gradients behind the backward pass.
        bucket_cap_mb: Size of a bucket in MiB.
    """

    job: Job
    overlap: bool = False
    bucket_cap_mb: float = 25.0

    def __post_init__(self) -> None:
        check_switch("overlap of the block", self.overlap)
        rule = "a number of MiB in (0, 2048]"
        check_number("bucket_cap_mb of the block", self.bucket_cap_mb, rule=rule, remedy="use 25", low=0.0, high=2048.0)
        if not isinstance(self.job.algorithm, DDPAlgorithm):
            raise ConfigError(
                f"the block {KEY!r} must name an algorithm that replaces DeepSpeed's average (dgc, topk, dense), got "
                f"{self.job.algorithm.name!r}; attach another family's to the bare model, without DeepSpeed"
            )
        if self.job.batch is not None:
            raise ConfigError(
                f"DeepSpeed accumulates by itself, got a table batch in the block {KEY!r}; leave it out, or train with "
                "distopt.AdaptiveBatch in a loop of your own"
            )

    @property
    def algorithm(self) -> DDPAlgorithm:
        """The algorithm to attach."""
        assert isinstance(self.job.algorithm, DDPAlgorithm)
        return self.job.algorithm

    @classmethod
    def load(cls, source: JobSource) -> Self:
        """The block that a mapping describes, or the job (also a file's) that it consists of.

        In a mapping the integration's own keys stand beside the job's: `overlap`, `bucket_cap_mb`, and `job`, the
        path of a job's file in place of its keys.

        Raises:
            ConfigError: A key is unknown, or a value breaks its rule.
        """
        if not isinstance(source, Mapping):
            return cls(job=Job.load(source))
        rest = dict(source)
        own = {key: rest.pop(key) for key in ("overlap", "bucket_cap_mb") if key in rest}
        if "job" not in rest:
            return cls(job=Job.load(rest), **own)
        path = rest.pop("job")
        if rest:
            raise ConfigError(
                f"beside job={path!r} the block may hold overlap and bucket_cap_mb, got {', '.join(map(repr, rest))}; "
                "write those keys into that file"
            )
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f'job must be the path of a job\'s file, got {path!r}; use "distopt.toml"')
        return cls(job=Job.load(path), **own)


def take_block(config: Mapping[str, Any]) -> tuple[Block, dict[str, Any]]:
    """The block of a ds_config, and the ds_config without it.

    Raises:
        ConfigError: There is no such block, or it breaks a rule.
    """
    rest = dict(config)
    source = rest.pop(KEY, None)
    if source is None:
        raise ConfigError(
            f'ds_config must have a block {KEY!r}, got the keys {", ".join(sorted(config))}; add "{KEY}": '
            '{"algorithm": "dgc", "density": 0.001}, or call deepspeed.initialize for plain averages'
        )
    return Block.load(source), rest


def read_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """A ds_config given as DeepSpeed takes it: a mapping, the path of a JSON file, or its text in base64.

    Raises:
        ConfigError: It cannot be read.
    """
    if isinstance(config, Mapping):
        return config
    hjson = host_module("hjson")  # what DeepSpeed reads it with: JSON with comments
    text = os.fspath(config)
    try:
        if os.path.exists(text):
            with open(text, encoding="utf-8") as file:
                content = hjson.load(file, object_pairs_hook=_without_duplicates)
        else:
            content = hjson.loads(base64.urlsafe_b64decode(text).decode())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config must be a mapping or the path of a ds_config in JSON, got {text!r}, which cannot be read ({error})"
            "; correct it there"
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"a ds_config must be a mapping, got {type(content).__name__} in {text!r}; write its keys")
    return dict(content)


def host_module(name: str) -> Any:
    """A module of DeepSpeed, or one that is installed with it.

    Raises:
        CompatibilityError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise CompatibilityError(
            f"distopt.integrations.deepspeed needs DeepSpeed, which is not installed ({error}); "
            "pip install torch-distopt[deepspeed], after torch"
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the keys {', '.join(map(repr, twice))} stand in it twice")
    return content
