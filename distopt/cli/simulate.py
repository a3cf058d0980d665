"""`distopt simulate`: a federated job as a TOML file describes it, from its data to its history."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from distopt.cli import datasets, ranks
from distopt.cli.datasets import Dataset
from distopt.cli.simulate_config import CORRELATED, Settings
from distopt.errors import ConfigError, StateMismatchError, in_a_line
from distopt.federated import (
    ClientData,
    ColumnPartition,
    History,
    Layout,
    LocalTraining,
    NaturalPartition,
    ProgressBar,
    Simulation,
    Synchronous,
    TensorBoard,
)

CHECKPOINT, DESCRIPTION = "checkpoint.pt", "config.json"
_BATCH = 1000  # test samples at a time
# When a run goes on; the checkpoint knows its mode.
_MAY_CHANGE = {"rounds", "evaluate_every", "checkpoint_every", "mode", "spill", "stop_at_epsilon"}


class Job:
    """A job that is ready to run, everything in its file being checked.

    Attributes:
        settings: Of the file.
        folder: Where its files go.
        title: What it is, in a line.
        simulation: Of `distopt.federated`.

    Raises:
        ConfigError: Something in the file breaks its rule.
        CompatibilityError: Parts of it do not go together.
    """

    def __init__(self, settings: Settings, folder: Path, progress: Callable[[Mapping[str, Any]], None]) -> None:
        run = settings.run
        with settings.naming("data"):
            data = datasets.load(settings.data.dataset)
        with settings.naming("partition"):
            if isinstance(settings.partition, NaturalPartition | ColumnPartition):
                raise ConfigError(
                    f"partition must be one that goes by labels or sizes, got {settings.partition.name!r}, and no data "
                    'set here says who its samples come from; use "dirichlet", or ClientData in a script'
                )
            samples = (data.train_images, data.train_labels)
            clients = ClientData.split(samples, settings.partition, settings.data.clients, seed=run.seed)
        participation = settings.participation(clients)
        with settings.naming("participation"):
            process = participation.begin(clients.num_clients, run.seed)
        with settings.naming("delays"):
            delays = None if settings.delays is None else settings.delays.begin(clients.num_clients, run.seed)
        algorithm = settings.algorithm(clients, process, delays)
        local = settings.local if algorithm.takes_steps or "local" in settings.given else None
        if delays is None and not isinstance(algorithm.pacing, Synchronous):
            with settings.naming("delays"):
                raise ConfigError(
                    f"there must be delays for an algorithm that does not wait, got none for {algorithm.name!r}; write "
                    'delays = "uniform", say'
                )
        torch.manual_seed(run.seed)
        model = settings.model.build(data.shape, data.num_classes)
        with settings.naming("local"):
            _check_optimizer(settings.local)
        with settings.naming("run"):
            Layout(model, run.exclude)
        with settings.naming("algorithm"):
            self.simulation = Simulation(
                model=model,
                clients=clients,
                algorithm=algorithm,
                local=local,
                participation=participation,
                delays=settings.delays,
                evaluate=_evaluation(data),
                evaluate_every=run.evaluate_every,
                exclude=run.exclude,
                seed=run.seed,
                mode=run.mode,
                uplink=settings.uplink,
                folder=folder if run.spill else None,
                checkpoint=folder / CHECKPOINT,
                checkpoint_every=run.checkpoint_every,
                progress=progress,
                stop_at_epsilon=run.stop_at_epsilon,
            )
        self.settings, self.folder = settings, folder
        parts = (settings.partition, participation, settings.delays, settings.uplink)
        shared = ", ".join(each.name for each in parts if each is not None)
        self.title = (
            f"{data.name}, {clients.num_clients} clients ({shared}), {settings.model.name}, {algorithm.name}, "
            f"{run.rounds} rounds"
        )
        correlated = settings.tables["participation"].get("probability") == CORRELATED
        self._description = {
            "data": settings.data.to_dict(),
            "partition": settings.partition.to_dict(),
            "model": settings.model.to_dict(),
            "algorithm": algorithm.to_dict(),
            "local": settings.local.to_dict(),
            "participation": settings.tables["participation"] if correlated else participation.to_dict(),
            "delays": {} if settings.delays is None else settings.delays.to_dict(),
            "uplink": {} if settings.uplink is None else settings.uplink.to_dict(),
            "run": {name: value for name, value in run.to_dict().items() if name not in _MAY_CHANGE},
        }

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes: the first rank of those that share the clients, or the only one."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def begin(self, *, restart: bool) -> int:
        """Makes the folder, and takes its checkpoint back; how many rounds are done. Every rank must call it.

        Args:
            restart: Whether to delete the checkpoint instead.

        Raises:
            StateMismatchError: The folder's checkpoint is of another job.
        """
        checkpoint, description = self.folder / CHECKPOINT, self.folder / DESCRIPTION
        remedy = "start it anew with --restart, or give another folder with --out"
        goes_on = checkpoint.exists() and not restart
        if goes_on:
            self._check_same(description, remedy)
        ranks.wait_for_all()  # all have looked before the first one changes anything
        if not goes_on and self.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                checkpoint.unlink(missing_ok=True)
                description.write_text(json.dumps(self._description, indent=2) + "\n")
            except OSError as error:
                raise ConfigError(
                    f"folder must be one that can be written, got {str(self.folder)!r} ({error}); give another with "
                    "--out"
                ) from error
        ranks.wait_for_all()
        try:
            self.simulation.resume()
        except StateMismatchError as error:
            raise StateMismatchError(f"{checkpoint}: {error}; or {remedy}") from error
        if self.simulation.round > self.settings.run.rounds:
            with self.settings.naming("run"):
                raise ConfigError(
                    f"rounds must be at least the {self.simulation.round} that are done ({checkpoint}), got "
                    f"{self.settings.run.rounds}; {remedy}"
                )
        return self.simulation.round

    def _check_same(self, path: Path, remedy: str) -> None:
        try:
            recorded = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise StateMismatchError(f"{path} must be as the run wrote it, got {in_a_line(error)}; {remedy}") from error
        for table, values in json.loads(json.dumps(self._description)).items():
            before = recorded.get(table, {})
            for key in sorted({*values, *before}):
                if values.get(key) != before.get(key):
                    raise StateMismatchError(
                        f"{self.settings.path}, [{table}]: {key} must be {before.get(key)!r} as in {path}, got "
                        f"{values.get(key)!r}; {remedy}"
                    )

    def run(self) -> History:
        """Trains to the last round and saves."""
        history = self.simulation.run(self.settings.run.rounds)
        if self.settings.run.checkpoint_every:
            self.simulation.save()
        return history


def run(settings: Settings, folder: Path, console: Console, *, restart: bool) -> tuple[Job, History]:
    """Prepares the job, runs what is left of it while it says how far it is, and returns it with all its history.

    Raises:
        ConfigError: Something in the file breaks its rule.
        CompatibilityError: Parts of it do not go together, or what it needs is not installed.
        StateMismatchError: The folder's checkpoint is of another job.
    """
    with ExitStack() as stack:
        shown: list[Callable[[Mapping[str, Any]], None]] = [ProgressBar(settings.run.rounds, console)]
        if settings.output.tensorboard:
            shown.append(stack.enter_context(TensorBoard(folder)))

        def progress(row: Mapping[str, Any]) -> None:
            for show in shown:
                show(row)

        job = Job(settings, folder, progress)
        console.print(job.title, highlight=False)
        if done := job.begin(restart=restart):
            console.print(
                f"goes on after round {done} of {settings.run.rounds}: {folder / CHECKPOINT}", highlight=False
            )
        return job, job.run()


def _evaluation(data: Dataset) -> Callable[[nn.Module], dict[str, float]]:
    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = torch.cat([model(images) for images in data.test_images.split(_BATCH)])
        return {
            "accuracy": float((logits.argmax(1) == data.test_labels).double().mean()),
            "loss": float(nn.functional.cross_entropy(logits, data.test_labels)),
        }

    return evaluate


def _check_optimizer(local: LocalTraining) -> None:
    try:
        local.make([nn.Parameter(torch.zeros(1))], 0)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"options must be arguments of {local.optimizer}, got {dict(local.options)}: {error}; see its documentation"
        ) from error
