"""Messages between the members of a crew, each waited for apart: so it is known who is gone and who is silent."""

from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from distopt.comm.crew.assembly import Crew
from distopt.comm.crew.interruption import BrokenError, SilentError

_MOST_TAGS = 1 << 30


class Messages:
    """What is sent and received at the same time; then `wait`.

    Args:
        crew: Whose group nobody else uses meanwhile.
        tag: The same for both ends of a message.
        patience_s: For a connected member to say something.

    Attributes:
        bytes_sent: By this rank.
    """

    def __init__(self, crew: Crew, tag: int, patience_s: float) -> None:
        self._group, self._tag = crew.group, tag % _MOST_TAGS
        self._patience = timedelta(seconds=patience_s)
        self._works: list[tuple[int, Any]] = []
        self._broken: set[int] = set()
        self.bytes_sent = 0

    def send(self, place: int, tensor: Tensor) -> None:
        """Begins to send a CPU tensor to a place."""
        if tensor.numel():
            self._begin(place, self._group.send, tensor)
            self.bytes_sent += tensor.nbytes

    def receive(self, place: int, tensor: Tensor) -> None:
        """Begins to receive a CPU tensor of this form from a place."""
        if tensor.numel():
            self._begin(place, self._group.recv, tensor)

    def _begin(self, place: int, operation: Any, tensor: Tensor) -> None:
        try:
            self._works.append((place, operation([tensor], place, self._tag)))
        except RuntimeError:
            self._broken.add(place)

    def wait(self) -> None:
        """Until all has been sent and received.

        Raises:
            BrokenError: A connection is gone.
            SilentError: A connected member has said nothing in time.
        """
        for place, work in self._works:
            try:
                work.wait(self._patience)
            except RuntimeError as error:
                if "imed out" in str(error):
                    raise SilentError(place) from None
                self._broken.add(place)
        if self._broken:
            raise BrokenError(sorted(self._broken))


class Gathering:
    """What some members say, on all of them: begins when it is made; then `wait`.

    Args:
        crew: Of whose group nobody else uses this tag meanwhile.
        own: (nbytes,) uint8 on the CPU, of a sender; None of another member.
        nbytes: That each sender says.
        senders: Their places.
        tag: The same on all members.
        patience_s: For a connected member to say something.

    Attributes:
        bytes_sent: By this rank.
    """

    def __init__(
        self, crew: Crew, own: Tensor | None, nbytes: int, senders: Collection[int], tag: int, patience_s: float
    ) -> None:
        self._messages = Messages(crew, tag, patience_s)
        self._rows = torch.empty((len(senders), nbytes), dtype=torch.uint8)
        for row, place in zip(self._rows, sorted(senders), strict=True):
            if place != crew.place:
                self._messages.receive(place, row)
            else:
                assert own is not None
                row.copy_(own)
        if own is not None:
            for place in range(len(crew.members)):
                if place != crew.place:
                    self._messages.send(place, own)
        self.bytes_sent = self._messages.bytes_sent

    def wait(self) -> Tensor:
        """(senders, nbytes) uint8, in the order of their places.

        Raises:
            BrokenError: A connection is gone.
            SilentError: A connected member has said nothing in time.
        """
        self._messages.wait()
        return self._rows
