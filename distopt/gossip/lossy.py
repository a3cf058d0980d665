"""Averages over transports that lose messages: nothing of the mean is lost, only late.

What a node gives away must arrive once. A plain message that is lost takes its mass along, and one that the receiver
averages while the sender never hears an answer counts twice. Here are the two ways in which the sum over the nodes
stays what it was, and the two naive ones, for comparison.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from distopt.comm import Message, Transport
from distopt.comm.message import decode, encode
from distopt.errors import DecodeError

_SHARE, _OFFER, _ANSWER = range(1, 4)


class LossyNode:
    """One node of an average: its value, and what it tells the others.

    Args:
        transport: Which may lose frames.
        value: (d,) float64.
    """

    def __init__(self, transport: Transport, value: Tensor) -> None:
        self._transport = transport
        self.rank = transport.rank
        self._size = len(value)
        self._round = 0

    _beside: ClassVar[int] = 0  # numbers in a message, beside a vector like the value

    @property
    @abstractmethod
    def estimate(self) -> Tensor:
        """(d,), of the mean."""

    @abstractmethod
    def send(self, receivers: Sequence[int]) -> None:
        """Begins a round."""

    @abstractmethod
    def take(self, message: Message) -> None:
        """Something has arrived."""

    def listen(self, timeout_s: float = 0.0) -> int:
        """Takes all that has arrived; how many messages that were."""
        count = 0
        while (got := self._transport.receive(timeout_s)) is not None:
            source, frame = got
            try:
                message = decode(frame)
            except DecodeError:
                continue
            forms = [(tensor.shape, tensor.dtype) for tensor in message.tensors]
            if message.sender == source and forms == [((self._size + self._beside,), torch.float64)]:
                self.take(message)
                count += 1
        return count

    def _tell(self, destination: int, kind: int, number: int, *tensors: Tensor) -> None:
        self._transport.send(destination, encode(Message(kind, number, self.rank, tensors)))


class PlainPushSum(LossyNode):
    """Push-sum: a lost message takes its part of the sum along. The naive way."""

    _beside: ClassVar[int] = 1  # the weight

    def __init__(self, transport: Transport, value: Tensor) -> None:
        super().__init__(transport, value)
        self._mass = torch.cat([value.double(), torch.ones(1, dtype=torch.float64)])

    @property
    def estimate(self) -> Tensor:
        """See `LossyNode`."""
        return self._mass[:-1] / self._mass[-1]

    def send(self, receivers: Sequence[int]) -> None:
        """See `LossyNode`."""
        self._mass = self._mass / (1 + len(receivers))
        for receiver in receivers:
            self._tell(receiver, _SHARE, 0, self._mass)

    def take(self, message: Message) -> None:
        """See `LossyNode`."""
        self._mass = self._mass + message.tensors[0]


class CumulativePushSum(LossyNode):
    """Push-sum that tells each receiver all that it was ever given: what was lost is in the next message.

    With `sigma` the sum of all parts given to a receiver and `rho` the last `sigma` that it has heard, what arrives is
    `sigma - rho` (Hadjicostis, Vaidya and Dominguez-Garcia, "Robust Distributed Average Consensus via Exchange of
    Running Sums", IEEE Transactions on Automatic Control 2016). Works on any strongly connected graph; memory is a
    vector for each neighbour and direction.
    """

    _beside: ClassVar[int] = 1  # the weight

    def __init__(self, transport: Transport, value: Tensor) -> None:
        super().__init__(transport, value)
        self._mass = torch.cat([value.double(), torch.ones(1, dtype=torch.float64)])
        self._given: dict[int, Tensor] = {}
        self._heard: dict[int, tuple[int, Tensor]] = {}

    @property
    def estimate(self) -> Tensor:
        """See `LossyNode`."""
        return self._mass[:-1] / self._mass[-1]

    def send(self, receivers: Sequence[int]) -> None:
        """See `LossyNode`."""
        self._round += 1
        self._mass = self._mass / (1 + len(receivers))
        for receiver in receivers:
            self._given[receiver] = self._given.get(receiver, torch.zeros_like(self._mass)) + self._mass
            self._tell(receiver, _SHARE, self._round, self._given[receiver])

    def take(self, message: Message) -> None:
        """See `LossyNode`."""
        number, before = self._heard.get(message.sender, (0, torch.zeros_like(self._mass)))
        if message.round > number:  # an older sum says nothing new
            self._mass = self._mass + (message.tensors[0] - before)
            self._heard[message.sender] = message.round, message.tensors[0].clone()


class PlainPairs(LossyNode):
    """Whoever gets another's value averages, whether the other gets its own or not. The naive way, "keep your own"."""

    def __init__(self, transport: Transport, value: Tensor) -> None:
        super().__init__(transport, value)
        self._value = value.double().clone()

    @property
    def estimate(self) -> Tensor:
        """See `LossyNode`."""
        return self._value

    def send(self, receivers: Sequence[int]) -> None:
        """See `LossyNode`."""
        for receiver in receivers:
            self._tell(receiver, _SHARE, 0, self._value)

    def take(self, message: Message) -> None:
        """See `LossyNode`."""
        self._value = (self._value + message.tensors[0]) / 2


@dataclass
class _Dealing:
    """What a node has under way with one other.

    Attributes:
        number: Of the offer that is open, or the last one.
        offer: What was offered; None once it is answered.
        answered: Number of the other's last offer that was answered.
        answer: What was said to it.
    """

    number: int = 0
    offer: Tensor | None = None
    answered: int = 0
    answer: Tensor = field(default_factory=lambda: torch.empty(0))


class CommittedPairs(LossyNode):
    """Pairs that average both or not at all.

    One offers its value, the other answers with half the difference, `m = (offer - own) / 2`, and takes it at once; the
    one who has offered gives it away when it hears the answer. It asks again until it does, and the other says the same
    again, so each deal is made once; an offer that never arrives changes nothing. Until the answer has come m is with
    nobody, or with both: the sum is right when no deal is open (`settled`).
    """

    def __init__(self, transport: Transport, value: Tensor) -> None:
        super().__init__(transport, value)
        self._value = value.double().clone()
        self._deals: dict[int, _Dealing] = {}

    @property
    def estimate(self) -> Tensor:
        """See `LossyNode`."""
        return self._value

    @property
    def settled(self) -> bool:
        """Whether no deal of this node is open."""
        return all(deal.offer is None for deal in self._deals.values())

    def send(self, receivers: Sequence[int]) -> None:
        """See `LossyNode`. Where a deal is open it asks again instead of making another."""
        for receiver in receivers:
            deal = self._deals.setdefault(receiver, _Dealing())
            if deal.offer is None:
                deal.number, deal.offer = deal.number + 1, self._value.clone()
            self._tell(receiver, _OFFER, deal.number, deal.offer)

    def settle(self) -> None:
        """Asks again wherever a deal is open."""
        self.send([other for other, deal in self._deals.items() if deal.offer is not None])

    def take(self, message: Message) -> None:
        """See `LossyNode`."""
        deal = self._deals.setdefault(message.sender, _Dealing())
        if message.kind == _OFFER:
            if message.round > deal.answered:
                deal.answered, deal.answer = message.round, (message.tensors[0] - self._value) / 2
                self._value = self._value + deal.answer
            if message.round == deal.answered:
                self._tell(message.sender, _ANSWER, message.round, deal.answer)
        elif message.kind == _ANSWER and deal.offer is not None and message.round == deal.number:
            self._value = self._value - message.tensors[0]
            deal.offer = None
