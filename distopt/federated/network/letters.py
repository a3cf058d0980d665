"""What the server of a federated job and its sites tell each other, as messages of `distopt.comm`.

A site is a process, or a group of them, that hosts clients. It says hello with what it hosts and how it is set up; the
server bids it welcome, with the settings of the job and the version to go back to, or refuses it; it is ready, or says
what failed. Then tasks go down and replies come up until the end. Every letter but the hello names the session, which
is the server's run since its start: what belongs to another one is told apart.

Nothing is unpickled. A letter is JSON of known keys and kinds, then flat tensors; whatever else arrives is a
`DecodeError`.
"""

import enum
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distopt.comm import Message, message
from distopt.errors import DecodeError
from distopt.federated.layout import Layout
from distopt.federated.messages import Broadcast, Reply

SERVER = 0
TALK_BYTES = 8 << 20  # of a letter's text and lists of clients; settings may name a number for each client
MOST_TENSORS = 16
_MOST_VECTORS = 6  # of a letter: what any algorithm sends at a time, with some to spare
_REASON_CHARACTERS = 5_000
_MOST = 2**53


class Kind(enum.IntEnum):
    """What a letter is."""

    HELLO = 101  # site: whom I host, and how I am set up
    WELCOME = 102  # server: these are the settings, and this is the version to go back to
    REFUSAL = 103  # server: you cannot take part, and why
    READY = 104  # site: so it is
    FAILED = 105  # site: I do not go on, and why
    TASK = 106  # server: train these clients
    REPLY = 107  # site: of one client
    SAVING = 108  # server: this version is about to be saved; without a version: I am still there
    END = 109  # server: no more of anything; with a text if it failed


@dataclass(frozen=True, kw_only=True)
class Letter:
    """What all have.

    Attributes:
        sender: Rank that says so; who receives it compares that with where it came from.
        session: Of the server; empty where a site has none yet.
    """

    sender: int
    session: str = ""


@dataclass(frozen=True, kw_only=True)
class Hello(Letter):
    """See `Kind.HELLO`; `facts` are by name, `samples` one for each of `hosts`."""

    hosts: Sequence[int]
    samples: Sequence[int]
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Welcome(Letter):
    """See `Kind.WELCOME`."""

    version: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Refusal(Letter):
    """See `Kind.REFUSAL`."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Ready(Letter):
    """See `Kind.READY`."""


@dataclass(frozen=True, kw_only=True)
class Failed(Letter):
    """See `Kind.FAILED`."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Task(Letter):
    """See `Kind.TASK`.

    Attributes:
        saved: The newest version that the server can go back to after its own death.
        overrules: Whether nobody waits for earlier tasks any more.
        clients: Whom to train.
        broadcast: On what.
    """

    saved: int
    overrules: bool
    clients: Sequence[int]
    broadcast: Broadcast


@dataclass(frozen=True, kw_only=True)
class Answer(Letter):
    """See `Kind.REPLY`; the tensors named in `packed` are payloads of the job's compression."""

    reply: Reply
    packed: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, kw_only=True)
class Saving(Letter):
    """See `Kind.SAVING`."""

    version: int | None


@dataclass(frozen=True, kw_only=True)
class End(Letter):
    """See `Kind.END`."""

    reason: str = ""


def longest_frame(layout: Layout) -> int:
    """Of a job with such a model, in bytes."""
    return TALK_BYTES + 4096 + _MOST_VECTORS * layout.num_elements * layout.dtype.itemsize


def encode(letter: Letter) -> Tensor:
    """The letter as a frame."""
    return message.encode(_to_message(letter))


def decode(frame: Tensor) -> Letter:
    """The letter in a frame; its tensors are views into it.

    Raises:
        DecodeError: It is none.
    """
    told = message.decode(frame)
    made = _MADE.get(told.kind)
    if made is None:
        raise DecodeError(f"a letter is of a kind in {[int(kind) for kind in Kind]}, got {told.kind}")
    if not 1 <= len(told.tensors) <= MOST_TENSORS or told.numbers:
        raise DecodeError(f"a letter has 1 to {MOST_TENSORS} tensors and no numbers, got {len(told.tensors)}")
    if any(tensor.dim() != 1 for tensor in told.tensors):
        raise DecodeError(f"tensors of a letter are flat, got {[tuple(tensor.shape) for tensor in told.tensors]}")
    return made(_Opened(told))


def length(frame: Tensor) -> int:
    """Bytes of the letter in a frame that `decode` takes; a receiver's buffer may be longer."""
    return message.length(frame)


# -- from letters ------------------------------------------------------------------------------------------------------


def _to_message(letter: Letter) -> Message:
    match letter:
        case Hello(hosts=hosts, samples=samples, facts=facts):
            return _message(Kind.HELLO, letter, 0, {"facts": facts}, _integers(hosts), _integers(samples))
        case Welcome(version=version, settings=settings):
            return _message(Kind.WELCOME, letter, version, {"settings": settings})
        case Refusal(reason=reason):
            return _message(Kind.REFUSAL, letter, 0, {"reason": reason[:_REASON_CHARACTERS]})
        case Ready():
            return _message(Kind.READY, letter, 0, {})
        case Failed(reason=reason):
            return _message(Kind.FAILED, letter, 0, {"reason": reason[:_REASON_CHARACTERS]})
        case Task(broadcast=sent):
            facts = {"saved": letter.saved, "overrules": letter.overrules, "extras": list(sent.extras)}
            tensors = (_integers(letter.clients), sent.model, *sent.extras.values())
            return _message(Kind.TASK, letter, sent.version, facts, *tensors)
        case Answer(reply=reply, packed=packed):
            facts = {
                "client": reply.client,
                "samples": reply.num_samples,
                "steps": reply.num_steps,
                "names": list(reply.tensors),
                "packed": sorted(packed),
            }
            return _message(Kind.REPLY, letter, reply.version, facts, *reply.tensors.values())
        case Saving(version=version):
            return _message(Kind.SAVING, letter, -1 if version is None else version, {})
        case End(reason=reason):
            return _message(Kind.END, letter, 0, {"reason": reason[:_REASON_CHARACTERS]})
    raise DecodeError(f"there is no form of {type(letter).__name__}")


def _message(kind: Kind, letter: Letter, round: int, content: Mapping[str, Any], *tensors: Tensor) -> Message:
    text = json.dumps({"session": letter.session, **content}).encode()
    return Message(kind, round, letter.sender, (torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors))


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


# -- to letters --------------------------------------------------------------------------------------------------------


class _Opened:
    """A message whose text is read, and whose fields are checked as they are taken."""

    def __init__(self, told: Message) -> None:
        self.tensors = told.tensors[1:]
        self.round, self.sender = told.round, told.sender
        text = told.tensors[0]
        if text.dtype != torch.uint8 or text.numel() > TALK_BYTES:
            raise DecodeError(f"a letter's text is at most {TALK_BYTES} bytes, got {text.numel()} of {text.dtype}")
        try:
            content = json.loads(text.numpy().tobytes())
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"a letter's text is JSON, got something else: {error!s:.200}") from error
        if not isinstance(content, dict):
            raise DecodeError(f"a letter's text is a JSON object, got a {type(content).__name__}")
        self._content = content
        self.session = self.take("session", str)
        if len(self.session) > 64:
            raise DecodeError(f"a session has at most 64 characters, got {len(self.session)}")

    def take(self, name: str, kind: type) -> Any:
        value: Any = self._content.get(name)
        if type(value) is not kind:  # True is no integer here
            raise DecodeError(f"{name} of a letter is of {kind.__name__}, got {value!r:.100}")
        if isinstance(value, int) and not 0 <= value < _MOST:
            raise DecodeError(f"{name} of a letter is from 0 to {_MOST}, got {value!r:.100}")
        return value

    def names(self, name: str) -> list[str]:
        listed: list[str] = self.take(name, list)
        if len(listed) > MOST_TENSORS or not all(type(each) is str and len(each) <= 100 for each in listed):
            raise DecodeError(f"{name} of a letter are at most {MOST_TENSORS} short names, got {listed!r:.200}")
        if len(set(listed)) != len(listed):
            raise DecodeError(f"{name} of a letter are different ones, got {listed!r:.200}")
        return listed

    def integers(self, at: int) -> list[int]:
        if len(self.tensors) <= at or self.tensors[at].dtype != torch.int64 or self.tensors[at].nbytes > TALK_BYTES:
            raise DecodeError(f"tensor {at} of this letter is a list of int64, got something else")
        values: list[int] = self.tensors[at].tolist()
        if values and not 0 <= min(values) <= max(values) < _MOST:
            raise DecodeError(f"a letter's list has numbers from 0 to {_MOST}, got {min(values)} to {max(values)}")
        return values

    def version(self) -> int:
        if not 0 <= self.round < _MOST:
            raise DecodeError(f"a version is from 0 to {_MOST}, got {self.round}")
        return self.round

    def floats(self, count: int, start: int) -> tuple[Tensor, ...]:
        found = self.tensors[start:]
        if len(found) != count:
            raise DecodeError(f"this letter has {count} tensors of values, got {len(found)}")
        return found

    def no_tensors(self) -> None:
        self.floats(0, 0)


def _hello(opened: _Opened) -> Letter:
    opened.floats(0, 2)
    hosts, samples = opened.integers(0), opened.integers(1)
    if len(hosts) != len(samples) or len(set(hosts)) != len(hosts):
        raise DecodeError(f"a hello has a number of samples for each client, got {len(samples)} for {len(hosts)}")
    facts = opened.take("facts", dict)
    return Hello(sender=opened.sender, session=opened.session, hosts=hosts, samples=samples, facts=facts)


def _welcome(opened: _Opened) -> Letter:
    opened.no_tensors()
    settings = opened.take("settings", dict)
    return Welcome(sender=opened.sender, session=opened.session, version=opened.version(), settings=settings)


def _of_reason(made: Callable[..., Letter]) -> Callable[[_Opened], Letter]:
    def make(opened: _Opened) -> Letter:
        opened.no_tensors()
        return made(sender=opened.sender, session=opened.session, reason=opened.take("reason", str))

    return make


def _ready(opened: _Opened) -> Letter:
    opened.no_tensors()
    return Ready(sender=opened.sender, session=opened.session)


def _task(opened: _Opened) -> Letter:
    names = opened.names("extras")
    model, *extras = opened.floats(1 + len(names), 1)
    if any(not tensor.is_floating_point() for tensor in (model, *extras)):
        raise DecodeError(f"a task has floating-point tensors, got {[tensor.dtype for tensor in (model, *extras)]}")
    broadcast = Broadcast(version=opened.version(), model=model, extras=dict(zip(names, extras, strict=True)))
    clients = opened.integers(0)
    if len(set(clients)) != len(clients):
        raise DecodeError(f"a task has each client once, got {len(clients)} with {len(set(clients))} different")
    return Task(
        sender=opened.sender,
        session=opened.session,
        saved=opened.take("saved", int),
        overrules=opened.take("overrules", bool),
        clients=clients,
        broadcast=broadcast,
    )


def _answer(opened: _Opened) -> Letter:
    names, packed = opened.names("names"), opened.names("packed")
    tensors = dict(zip(names, opened.floats(len(names), 0), strict=True))
    if not set(packed) <= set(names) or any(tensors[name].dtype != torch.uint8 for name in packed):
        raise DecodeError(f"what is packed are bytes among {names}, got {packed}")
    reply = Reply(
        client=opened.take("client", int),
        version=opened.version(),
        num_samples=opened.take("samples", int),
        num_steps=opened.take("steps", int),
        tensors=tensors,
    )
    return Answer(sender=opened.sender, session=opened.session, reply=reply, packed=frozenset(packed))


def _saving(opened: _Opened) -> Letter:
    opened.no_tensors()
    version = None if opened.round == -1 else opened.version()
    return Saving(sender=opened.sender, session=opened.session, version=version)


_MADE: dict[int, Callable[[_Opened], Letter]] = {
    Kind.HELLO: _hello,
    Kind.WELCOME: _welcome,
    Kind.REFUSAL: _of_reason(Refusal),
    Kind.READY: _ready,
    Kind.FAILED: _of_reason(Failed),
    Kind.TASK: _task,
    Kind.REPLY: _answer,
    Kind.SAVING: _saving,
    Kind.END: _of_reason(End),
}
