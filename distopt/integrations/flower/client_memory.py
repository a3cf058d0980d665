"""Where a client keeps its vectors between two messages: in Flower's context, or in a folder that outlives the run.

A server that goes on from a checkpoint asks again for rounds that its clients have answered already. So a client with
a folder keeps what it had after each answer since the server's last checkpoint, and answers from what it had before.

Limits: Flower's context belongs to a run and a node: a new run, or a node that is started again, has an empty one.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from distopt.errors import ConfigError, StateMismatchError
from distopt.integrations.flower.records import from_arrays, to_arrays

_KEPT = "distopt.kept"
_ANSWERED = "distopt.answered"
NEVER = -1


class ClientMemory(ABC):
    """What a client keeps, by name."""

    @property
    @abstractmethod
    def answered(self) -> int:
        """The last version that it has answered, `NEVER` if none."""

    @abstractmethod
    def before(self, version: int) -> dict[str, Tensor]:
        """What it had when it was to answer this version first.

        Raises:
            StateMismatchError: It has not got that any more.
        """

    @abstractmethod
    def keep(self, version: int, kept: Mapping[str, Tensor], *, saved: int) -> None:
        """What it has after its answer to this version; the server will not ask for versions before `saved`."""


class InContext(ClientMemory):
    """In the state of a `flwr.app.Context`.

    Args:
        state: Of the context.
        run: Which strategy asks; what was kept for an earlier one is forgotten.
    """

    def __init__(self, state: RecordDict, run: str) -> None:
        self._state, self._run = state, run

    @property
    def answered(self) -> int:
        """See `ClientMemory.answered`."""
        record = self._state.config_records.get(_ANSWERED)
        return NEVER if record is None or record["run"] != self._run else int(str(record["version"]))

    def before(self, version: int) -> dict[str, Tensor]:
        """See `ClientMemory.before`."""
        if self.answered >= version:
            raise StateMismatchError(
                f"a client must not be asked for version {version} again, it has answered {self.answered}; begin a new "
                "run, and give client_app a folder where one goes on from a checkpoint"
            )
        return {} if self.answered == NEVER else from_arrays(self._state.array_records[_KEPT])

    def keep(self, version: int, kept: Mapping[str, Tensor], *, saved: int) -> None:
        """See `ClientMemory.keep`."""
        self._state[_KEPT] = to_arrays(kept)
        self._state[_ANSWERED] = ConfigRecord({"version": version, "run": self._run})


class InFolder(ClientMemory):
    """In files of one client, one for each answer that the server may ask for again.

    Args:
        folder: Where to make a folder for the run, and in it one for the client.
        run: Which strategy asks, and goes on asking after it has been taken back from a checkpoint.
        client: Its number.

    Raises:
        ConfigError: The run's name would not do as that of a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str, client: int) -> None:
        if not run.isalnum():  # it came from somewhere else
            raise ConfigError(f"a run must have a name of letters and digits, got {run!r:.80}; use FederatedStrategy")
        self._folder = Path(folder) / run / f"client-{client}"

    @property
    def answered(self) -> int:
        """See `ClientMemory.answered`."""
        return max(self._versions(), default=NEVER)

    def before(self, version: int) -> dict[str, Tensor]:
        """See `ClientMemory.before`."""
        versions = self._versions()
        earlier = [each for each in versions if each < version]
        if not earlier:
            if version and versions:
                raise StateMismatchError(
                    f"{self._folder} must hold what the client kept before version {version}, got {versions}; the "
                    "server's checkpoint is older than that: begin anew, with an empty folder"
                )
            return {}
        kept: dict[str, Tensor] = torch.load(self._path(max(earlier)), weights_only=True)
        return kept

    def keep(self, version: int, kept: Mapping[str, Tensor], *, saved: int) -> None:
        """See `ClientMemory.keep`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / "kept.tmp"
        torch.save(dict(kept), temporary)
        temporary.replace(self._path(version))
        versions = self._versions()
        needed = max((each for each in versions if each < saved), default=NEVER)
        for each in versions:
            if each < needed or each > version:  # those after it were answers that the server has forgotten
                self._path(each).unlink(missing_ok=True)

    def _versions(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("kept-")) for path in self._folder.glob("kept-*.pt"))

    def _path(self, version: int) -> Path:
        return self._folder / f"kept-{version:08d}.pt"
