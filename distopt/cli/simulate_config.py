"""The TOML file of `distopt simulate`: a table for each part of a job, each made by the configuration class it is of.

Whatever is wrong in the file is said with its name, the table, the value and the rule. What depends on the data (who
takes part, where that is correlated with the labels) is made when they are there.
"""

import dataclasses
import importlib.util
import math
import sys
import tomllib
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.cli.models import Model
from distopt.config import Configurable, check_choice, check_count, check_number, check_switch
from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import (
    ClientData,
    DelayProcess,
    Delays,
    FederatedAlgorithm,
    LocalTraining,
    Participation,
    ParticipationProcess,
    Partition,
    UplinkCompression,
    correlated_probabilities,
    label_distributions,
)
from distopt.federated.execution.choose import MODES
from distopt.federated.privacy.private_algorithm import PrivateAlgorithm

FloatArray = NDArray[np.float64]

CORRELATED = "correlated"
DELAYS = "delays"
_KNOWN = "known-participation"


@dataclass(frozen=True, kw_only=True)
class Data(Configurable, tag="data", name="data"):
    """Which samples, and how many clients share them.

    Raises:
        ConfigError: A value breaks its rule.
    """

    dataset: str = "digits"  # or "fashion-mnist", or a folder of IDX files
    clients: int = 50  # more have less data each

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ConfigError(f'dataset must be a name or a folder, got {self.dataset!r}; use "digits"')
        check_count("clients", self.clients, low=1, remedy="give how many share the data")


@dataclass(frozen=True, kw_only=True)
class Run(Configurable, tag="run", name="run"):
    """How long, how often something is looked at or saved, and the seed; see `Simulation`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    rounds: int = 200  # in all, those before a restart included
    seed: int = 0
    evaluate_every: int = 1  # in rounds: larger saves time
    checkpoint_every: int = 100  # in rounds: smaller loses less when the run is killed; 0 for never
    exclude: tuple[str, ...] = ()  # more of the model stays with each client
    mode: str = "auto"  # how clients are computed: another mode is faster, its last bits are others
    spill: bool = False  # True: clients' vectors lie in files of the folder: slower, and more of them
    stop_at_epsilon: float | None = None  # of a private algorithm: smaller ends the run earlier

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds, low=1, remedy="give how many rounds in all")
        check_count("seed", self.seed, low=0, remedy="use 0")
        check_count("evaluate_every", self.evaluate_every, low=1, remedy="use 1 for every round")
        check_count("checkpoint_every", self.checkpoint_every, low=0, remedy="use 0 for never")
        if not isinstance(self.exclude, tuple) or not all(isinstance(name, str) for name in self.exclude):
            raise ConfigError(f'exclude must be a list of names, got {self.exclude!r}; use ["batch-norm"] or []')
        check_choice("mode", self.mode, MODES)
        check_switch("spill", self.spill)
        if self.stop_at_epsilon is not None:
            remedy, rule = "use 3.0, or leave it out", "a number above 0"
            check_number("stop_at_epsilon", self.stop_at_epsilon, rule=rule, remedy=remedy, low=0.0, high=math.inf)


@dataclass(frozen=True, kw_only=True)
class Output(Configurable, tag="output", name="output"):
    """What a run leaves, and where.

    Raises:
        ConfigError: A value breaks its rule.
    """

    folder: str = "runs/simulate"  # one for each run
    target: float | None = None  # test accuracy whose first time is reported
    tensorboard: bool = False  # whether to write events too

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str) or not self.folder:
            raise ConfigError(f'folder must be the name of a folder, got {self.folder!r}; use "runs/simulate"')
        if self.target is not None:
            remedy = "use 0.9 for 90%"
            check_number("target", self.target, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)
        check_switch("tensorboard", self.tensorboard)


# What a table makes, and what it holds where it is left out.
_NEEDED = "algorithm"
_TABLES: dict[str, tuple[type[Configurable], dict[str, Any] | None]] = {
    "data": (Data, {}),
    "partition": (Partition, {"partition": "iid"}),
    "model": (Model, {"model": "mlp"}),
    "algorithm": (FederatedAlgorithm, None),
    "local": (LocalTraining, {"steps": 5}),
    "participation": (Participation, {"participation": "everybody"}),
    "delays": (Delays, None),
    "uplink": (UplinkCompression, None),
    "run": (Run, {}),
    "output": (Output, {}),
}


class Settings:
    """A file's tables, which `made` turns into what they describe.

    Attributes:
        path: Of the file.
        tables: By name; those that were left out have their defaults.
        given: Names of those that were not left out.
    """

    def __init__(self, path: Path, tables: Mapping[str, dict[str, Any]], given: Collection[str]) -> None:
        self.path, self.given = path, frozenset(given)
        self.tables = dict(tables)
        self.data: Data = self._made("data")
        self.partition: Partition = self._made("partition")
        self.model: Model = self._made("model")
        self.local: LocalTraining = self._made("local")
        self.delays: Delays | None = self._made("delays") if "delays" in self.tables else None
        self.uplink: UplinkCompression | None = self._made("uplink") if "uplink" in self.tables else None
        self.run: Run = self._made("run")
        self.output: Output = self._made("output")

    def participation(self, clients: ClientData) -> Participation:
        """Who takes part. `probability = "correlated"` asks for the FedAU paper's, with `mean` and `minimum`.

        Raises:
            ConfigError: The table is wrong.
        """
        table = dict(self.tables["participation"])
        bounds = {name: table.pop(name) for name in ("mean", "minimum") if name in table}
        with self.naming("participation"):
            if table.get("probability") == CORRELATED:
                shares = label_distributions(clients.parts, clients.tensors[-1])
                chances = correlated_probabilities(shares, seed=self.run.seed, **bounds)
                table["probability"] = tuple(chances.tolist())
            elif bounds:
                raise ConfigError(
                    f"probability must be {CORRELATED!r} beside {' and '.join(bounds)}, got "
                    f"{table.get('probability')!r}; change it, or leave {' and '.join(bounds)} out"
                )
        made: Participation = self._made("participation", table)
        return made

    def algorithm(
        self, clients: ClientData, participation: ParticipationProcess, delays: DelayProcess | None
    ) -> FederatedAlgorithm:
        """The algorithm, told what only the job knows, where the file asks for it or leaves it out.

        `known-participation` without `probability` gets that of the model of participation, `times_s = "delays"`
        becomes the mean seconds of each client, and private algorithms get the `rounds`, `num_clients` and
        `fewest_samples` that their noise depends on.

        Raises:
            ConfigError: The table is wrong.
        """
        table = dict(self.tables["algorithm"])
        with self.naming("algorithm"):
            if table.get("algorithm") == _KNOWN and "probability" not in table:
                table["probability"] = _told("probability", participation.probabilities, "participation")
            if table.get("times_s") == DELAYS:
                table["times_s"] = _told("times_s", None if delays is None else delays.mean_s, "delays")
            for name, fact in self._of_job(table, clients).items():
                table.setdefault(name, fact)
        made: FederatedAlgorithm = self._made("algorithm", table)
        return made

    def _of_job(self, table: Mapping[str, Any], clients: ClientData) -> dict[str, int]:
        made = FederatedAlgorithm._known.get(str(table.get("algorithm")))
        if not (isinstance(made, type) and issubclass(made, PrivateAlgorithm)):
            return {}
        facts = {"num_clients": clients.num_clients, "fewest_samples": min(map(len, clients.parts))}
        fields = {field.name for field in dataclasses.fields(made)}
        told = {name: fact for name, fact in facts.items() if name in fields}
        return told | ({"rounds": self.run.rounds} if "epsilon" in table or told else {})

    @contextmanager
    def naming(self, table: str) -> Iterator[None]:
        """What is raised inside begins with the names of the file and the table."""
        try:
            yield
        except (ConfigError, CompatibilityError) as error:
            raise type(error)(f"{self.path}, [{table}]: {error}") from error

    def _made(self, name: str, table: Mapping[str, Any] | None = None) -> Any:
        kind = _TABLES[name][0]
        alone = {kind.tag: kind.name} if hasattr(kind, "name") else {}  # of a kind of which there is but one
        with self.naming(name):
            return kind.from_dict({**alone, **(self.tables[name] if table is None else table)})


def read(path: Path) -> Settings:
    """The settings in a file, whose plugins are imported.

    Raises:
        ConfigError: The file cannot be read, is no TOML, or something in it is unknown or breaks its rule.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; distopt simulate --init {path} writes a default") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} must be TOML: {error}; text stands in quotes, [names] before tables") from error
    _import_plugins(path, content.pop("plugins", []))
    if unknown := sorted(set(content) - set(_TABLES)):
        raise ConfigError(
            f"{path}: unknown table {', '.join(map(repr, unknown))}; known ones are {', '.join(_TABLES)}, and the list "
            "plugins before the first of them"
        )
    tables = {}
    for name, (kind, default) in _TABLES.items():
        table = content.get(name, default)
        if table is None and name != _NEEDED:
            continue
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {name} must be a table, got {table!r}; write [{name}] and its keys below, such "
                f"as {kind.tag} = ..."
            )
        tables[name] = table
    return Settings(path, tables, content)


def default_text() -> str:
    """The commented default file."""
    return (files("distopt.cli") / "simulate.toml").read_text()


def _told(field: str, values: FloatArray | None, table: str) -> tuple[float, ...]:
    if values is None:
        raise ConfigError(f"{field} must be given where [{table}] does not say it; add it, one for all or one for each")
    return tuple(values.tolist())


def _import_plugins(path: Path, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{path}: plugins must be a list of Python files, got {names!r}; use ["my_algorithm.py"]')
    for name in names:
        file = path.parent / name
        module_name = f"distopt_plugin_{file.stem}"
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ConfigError(f"{path}: plugins must be Python files beside it, got {name!r}; {file} is none")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where dataclasses look for their own
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(
                f"{path}: plugins must be importable, got {type(error).__name__} from {file}{_line_of(error, file)}: "
                f"{error}"
            ) from error


def _line_of(error: Exception, file: Path) -> str:
    """Where in a file it came about; a syntax error says that itself."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" (line {lines[-1]})" if lines else ""
