"""A small store that each rank keeps, where ranks that have lost each other meet again.

Every rank has one, a `torch.distributed.TCPStore`, so that no single rank's death takes the only one away. Ranks that
look for the others turn to the board of the lowest rank that answers.
"""

import contextlib
import json
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_CONNECT_S = 1.5  # a host that is there answers in less; one that is cut off costs so much
_ANSWER_S = 10.0  # a busy machine


class GoneError(Exception):
    """Nobody listens there any more: the process has ended."""


class UnreachableError(Exception):
    """No answer: the process is stopped, or the network is cut."""


class Board:
    """A connection to a rank's store."""

    def __init__(self, store: TCPStore) -> None:
        self.store = store

    @classmethod
    def host(cls, interface: str) -> "Board":
        """A new one in this process, on a port that the system chooses."""
        return cls(TCPStore(interface, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_ANSWER_S)))

    @classmethod
    def connect(cls, host: str, port: int) -> "Board":
        """To another's.

        Raises:
            GoneError: Nobody listens there.
            UnreachableError: Nobody answers.
        """
        try:
            socket.create_connection(
                (host, port), timeout=_CONNECT_S
            ).close()  # TCPStore itself would try again for long
        except ConnectionRefusedError as error:
            raise GoneError from error
        except OSError as error:
            raise UnreachableError from error
        try:
            return cls(
                TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_ANSWER_S))
            )
        except (RuntimeError, OSError) as error:
            raise UnreachableError from error

    @property
    def port(self) -> int:
        """Where the store listens."""
        return int(self.store.port)

    def write(self, key: str, value: Any) -> None:
        """Anything that JSON can hold."""
        self.store.set(key, json.dumps(value))

    def read(self, key: str, timeout_s: float = _ANSWER_S) -> Any:
        """What was written.

        Raises:
            UnreachableError: Nothing was within the time, or the store is gone.
        """
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
            return json.loads(self.store.get(key))
        except (RuntimeError, OSError) as error:
            raise UnreachableError from error

    def has(self, key: str) -> bool:
        """Whether something was written; False if the store is gone."""
        with contextlib.suppress(RuntimeError, OSError):
            return bool(self.store.check([key]))
        return False

    def count(self, key: str, by: int = 1) -> int:
        """Adds to a counter; its new value."""
        try:
            return int(self.store.add(key, by))
        except (RuntimeError, OSError) as error:
            raise UnreachableError from error
