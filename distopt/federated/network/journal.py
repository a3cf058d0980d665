"""What the clients of a site keep, such that the site can go back with a server that goes on from its checkpoint.

The server says which version it is about to save. From then on, the first time a client's vectors change, what they
were is put aside; once a later version has been saved, nobody goes back before it, and what was put aside for earlier
ones goes. So a client that did not change costs nothing, and one that did one more copy.

With a file, a site whose own process dies goes on with what its clients kept. It is written before a reply leaves, so
no client has answered with what it does not remember.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distopt.errors import StateMismatchError, in_a_line
from distopt.federated.client_vectors import ClientVectors

_FORMAT = 1


class Journal:
    """See the module.

    Args:
        tables: What the clients keep now, by name; changed when the site goes back.
        path: The file; None for none.
        described: What the file's site and this one must agree in.
    """

    def __init__(
        self,
        tables: Mapping[str, ClientVectors],
        path: str | os.PathLike[str] | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        self._tables = tables
        self._path = None if path is None else Path(path)
        self._described = dict(described or {})
        self._session = ""  # of the server to which this site went back last
        self._answered = -1  # the newest version that a client has answered
        self._before: dict[int, dict[int, dict[str, Tensor]]] = {0: {}}  # by version, then client; {} had nothing

    @property
    def has_file(self) -> bool:
        """Whether it is written."""
        return self._path is not None

    def about_to_answer(self, version: int, client: int) -> None:
        """A client's vectors may change now."""
        self._answered = max(self._answered, version)
        newest = self._before[max(self._before)]
        if client not in newest:
            newest[client] = {name: table.get(client) for name, table in self._tables.items() if client in table}

    def saving(self, version: int) -> None:
        """The server may go back to here."""
        if version > max(self._before):
            self._before[version] = {}

    def saved(self, version: int) -> None:
        """It will not go back further than this."""
        if self._answered < version:
            self.saving(version)  # which was said while this site was away
        if version in self._before:
            self._before = {each: put for each, put in self._before.items() if each >= version}

    def follow(self, session: str, version: int) -> None:
        """A server began a session at this version; goes back there, unless this site has been in it already.

        Raises:
            StateMismatchError: What clients kept then is not known any more.
        """
        if session != self._session:
            self._back_to(version)
            self._session = session

    def _back_to(self, version: int) -> None:
        if version not in self._before:
            if version <= self._answered and self._tables:
                raise StateMismatchError(
                    f"the server must go on from a version that this site can go back to, {sorted(self._before)}, got "
                    f"{version}, and clients have answered version {self._answered}; begin anew on both sides, without "
                    "their files"
                )
            self._before = {version: {}}
            return
        for at in sorted((each for each in self._before if each >= version), reverse=True):
            for client, vectors in self._before[at].items():
                for name, table in self._tables.items():
                    table.set(client, vectors.get(name, torch.zeros(table.length, dtype=table.dtype)))
        self._before = {each: put for each, put in self._before.items() if each < version} | {version: {}}
        self._answered = version - 1

    def write(self) -> None:
        """Writes the file, beside and renamed."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".tmp")
        torch.save(self.state_dict(), temporary)
        temporary.replace(self._path)

    def read(self) -> bool:
        """Takes the file back, if there is one; whether there was.

        Raises:
            StateMismatchError: It belongs to another site, or is damaged.
        """
        if self._path is None or not self._path.exists():
            return False
        try:
            self.load_state_dict(torch.load(self._path, weights_only=True))
        except StateMismatchError:
            raise
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise StateMismatchError(
                f"{self._path} must be what a site wrote, got {in_a_line(error)}; it is damaged or something else: "
                "remove it, and the site's clients begin with nothing kept"
            ) from error
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "format": _FORMAT,
            **self._described,
            "session": self._session,
            "answered": self._answered,
            "kept": {name: table.state_dict() for name, table in self._tables.items()},
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It belongs to another site or another job.
        """
        for name, own in {"format": _FORMAT, **self._described}.items():
            if state.get(name) != own:
                raise StateMismatchError(
                    f"what a site wrote and this site must agree in {name}, got {state.get(name)!r:.300} then and "
                    f"{own!r:.300} now; go on with what the job began with, or remove the file"
                )
        for name, table in self._tables.items():
            table.load_state_dict(state["kept"][name])
        self._session, self._answered, self._before = state["session"], state["answered"], state["before"]


def hosted(clients: Sequence[int]) -> str:
    """The clients in a few words."""
    listed = sorted(clients)
    if len(listed) > 8:
        return f"{len(listed)} clients, {listed[0]} to {listed[-1]}"
    return "clients " + ", ".join(map(str, listed))
