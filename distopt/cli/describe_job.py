"""`distopt job`: what a job's file means, or what is wrong with it; and a commented file to begin with."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.table import Table

from distopt.errors import ConfigError
from distopt.federated import FederatedAlgorithm
from distopt.job import Job
from distopt.job.checkpoint_folder import CheckpointFolder

_MODELS = {
    "ddp": "a DistributedDataParallel model",
    "gossip": "the bare model, which is not wrapped in DDP",
    "local": "the bare model, which is not wrapped in DDP",
    "coding": "the bare model, on a master and its workers",
}


def default_text() -> str:
    """The commented file."""
    return (files("distopt.cli") / "distopt.toml").read_text()


def describe(path: Path) -> dict[str, Any]:
    """What the file means, as plain values for JSON.

    Raises:
        ConfigError: Something is wrong with it, or its algorithm attaches to no model.
    """
    job = Job.load(path)
    algorithm = job.algorithm
    if isinstance(algorithm, FederatedAlgorithm):
        raise ConfigError(
            f"{path}: a federated job has no model to attach to before its rounds, got {algorithm.name!r}; describe it "
            "for distopt simulate (distopt simulate --init writes that file)"
        )
    plain = Job(algorithm=algorithm).to_dict()
    defaults = {field.name: field.default for field in algorithm.settings()}
    family = type(algorithm).__module__.split(".")[1]
    found = job.to_dict()
    newest = None
    if job.checkpoint is not None:
        newest = CheckpointFolder(job.checkpoint.folder, keep=job.checkpoint.keep).newest()
    return {
        "file": str(path),
        "algorithm": algorithm.name,
        "family": family,
        "attaches_to": _MODELS.get(family, "the model that its attach takes"),
        "settings": {key: value for key, value in plain.items() if key != "algorithm"},
        "changed": sorted(name for name, value in defaults.items() if getattr(algorithm, name) != value),
        "checkpoint": found.get("checkpoint"),
        "newest_checkpoint": None if newest is None else str(newest),
        "log": found.get("log"),
        "batch": found.get("batch"),
    }


def table(found: dict[str, Any]) -> Table:
    """The algorithm's settings; those that are not the default are marked."""
    made = Table(title=f"{found['file']}: {found['algorithm']}, for {found['attaches_to']}", title_justify="left")
    made.add_column("setting")
    made.add_column("value", overflow="fold")
    made.add_column("")
    for name, value in found["settings"].items():
        made.add_row(name, str(value), "set here" if name in found["changed"] else "default")
    return made


def lines(found: dict[str, Any]) -> str:
    """Its checkpoints and its log, and how the job is begun."""
    kept, log = found["checkpoint"], found["log"]
    said = ["Checkpoints: none; add a table [checkpoint]"]
    if kept is not None:
        newest = found["newest_checkpoint"]
        said = [
            f"Checkpoints: every {kept['every']} steps to {kept['folder']}, the newest {kept['keep']} are kept; "
            + (f"the job goes on from {newest}" if newest else "there is none yet")
        ]
    if log is None:
        said.append("Log: none; add a table [log]")
    else:
        more = [name for name in ("tensorboard", "report") if log[name]]
        said.append(f"Log: every {log['every']} steps to {log['folder']}{''.join(f', {name}' for name in more)}")
    given = ""
    if found["batch"] is not None:
        batch, given = found["batch"], ", loader=loader"
        said.append(f"Batch: grows to {batch['max_batch']} samples at most, by the {batch['test']} test")
    said.append(f'In the script: with distopt.Job.load("{found["file"]}").attach(model, optimizer{given}) as run: ...')
    return "\n".join(said)
