"""A site of a federated service: trains the clients that it hosts when the server asks, and keeps what they keep.

It says hello until it is bid welcome, takes over the settings that it was not given, and works off tasks in the order
in which they come. In a synchronous job a newer task overrules an older one. Where the server can come back, as over
TCP, the site waits for it, and goes back with it to the version that its checkpoint holds.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distopt.comm import Transport
from distopt.errors import CompatibilityError, ConfigError, DecodeError, DistoptError, PeerLostError, in_a_line
from distopt.federated.execution import Trainer
from distopt.federated.messages import Broadcast
from distopt.federated.network import letters
from distopt.federated.network.journal import Journal
from distopt.federated.network.letters import (
    SERVER,
    Answer,
    End,
    Failed,
    Hello,
    Letter,
    Ready,
    Refusal,
    Saving,
    Task,
    Welcome,
)
from distopt.federated.network.packing import pack
from distopt.spans import span

_log = logging.getLogger("distopt")
_LOOK_S = 0.1  # longest wait before the server's loss is looked for
_PROBE_S = 1.0
_HELLO_S = 2.0  # between two hellos to a server that does not answer

Build = Callable[[Mapping[str, Any]], tuple[Trainer, Journal]]


@dataclass(frozen=True, kw_only=True)
class Attendance:
    """What a site did.

    Attributes:
        hosts: Its clients.
        tasks: How many it began.
        replies: How many it sent.
        overruled: How many clients' work it left because the server had gone on.
        refused: What was no letter of the server, by reason.
        bytes_sent: In frames.
        bytes_received: In letters.
    """

    hosts: tuple[int, ...]
    tasks: int
    replies: int
    overruled: int
    refused: Mapping[str, int]
    bytes_sent: int
    bytes_received: int


class Site:
    """See the module.

    Args:
        transport: To the server, its rank 0.
        hosts: The numbers of the clients.
        samples: How many samples each has.
        facts: How this site is set up, see `facts_of`.
        build: Makes the trainer and the journal of the job's settings.
        wait_s: How long the server may take to say welcome at the start.
        patience_s: How long the server may be silent or gone later.
        may_return: Whether a server that is lost may come back.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hosts: Sequence[int],
        samples: Sequence[int],
        facts: Mapping[str, Any],
        build: Build,
        wait_s: float,
        patience_s: float,
        may_return: bool,
    ) -> None:
        self._transport, self._build = transport, build
        self._hosts, self._samples, self._facts = tuple(hosts), tuple(samples), facts
        self._wait_s, self._patience_s, self._may_return = wait_s, patience_s, may_return
        self._made: tuple[Trainer, Journal] | None = None
        self._settings: Mapping[str, Any] = {}
        self._session = self._invited = ""  # in which it is, and to which it was bid welcome
        self._connection = 0
        self._tasks: deque[Task] = deque()
        self._ended: str | None = None
        self._heard_s = self._probed_s = self._said_hello_s = time.monotonic()
        self._counted: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def take_part(self) -> Attendance:
        """Until the server says that nothing more comes.

        Raises:
            CompatibilityError: The server refuses this site.
            PeerLostError: The server is gone.
            DistoptError: The server has failed.
        """
        self._heard_s = time.monotonic()
        self._say_hello()
        try:
            while self._ended is None:
                if self._tasks:
                    self._work(self._tasks.popleft())
                elif not self._take(_LOOK_S):
                    self._look_after()
        except PeerLostError:
            raise
        except Exception as error:
            self._tell(Failed(sender=self._rank, session=self._invited, reason=in_a_line(error)))
            raise
        if self._ended:
            raise DistoptError(f"the server, rank {SERVER}, has ended the job: {self._ended}")
        return Attendance(
            hosts=self._hosts,
            tasks=self._counted["tasks"],
            replies=self._counted["replies"],
            overruled=self._counted["overruled"],
            refused=dict(self._refused),
            bytes_sent=self._counted["bytes sent"],
            bytes_received=self._counted["bytes received"],
        )

    # -- work ----------------------------------------------------------------------------------------------------------

    def _work(self, task: Task) -> None:
        assert self._made is not None
        trainer, journal = self._made
        journal.saved(task.saved)
        sent = _checked(task.broadcast, trainer)
        self._counted["tasks"] += 1
        late: list[Answer] = []
        for at, client in enumerate(task.clients):
            self._hear_all()
            if self._ended is not None or self._is_overruled(task):
                self._counted["overruled"] += len(task.clients) - at
                break
            journal.about_to_answer(sent.version, client)
            with span("federated", "train"):
                (reply,) = trainer.train(sent, [client])
            if self._has_come_back():
                self._counted["overruled"] += len(task.clients) - at
                late.clear()
                break
            answer = pack(reply, trainer.algorithm, trainer.uplink, sender=self._rank, session=task.session)
            if journal.has_file:
                late.append(answer)
            else:
                self._reply(answer)
        journal.write()
        for answer in late:
            self._reply(answer)

    def _reply(self, answer: Answer) -> None:
        self._counted["replies"] += 1
        self._tell(answer)

    def _is_overruled(self, task: Task) -> bool:
        return task.session != self._session or any(newer.overrules for newer in self._tasks) or self._has_come_back()

    def _has_come_back(self) -> bool:
        """Whether there is a new connection: says hello, and forgets what was asked on the one before.

        The server has given that up, or is another one, which waits for this hello before its first round.
        """
        if not self._may_return or SERVER in self._transport.lost or self._connections() == self._connection:
            return False
        self._counted["overruled"] += sum(len(task.clients) for task in self._tasks)
        self._tasks.clear()
        self._say_hello()
        return True

    # -- letters -------------------------------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        return self._transport.rank

    def _tell(self, letter: Letter) -> None:
        frame = letters.encode(letter)
        self._counted["bytes sent"] += frame.numel()
        self._transport.send(SERVER, frame)

    def _say_hello(self) -> None:
        self._said_hello_s = time.monotonic()
        self._connection = self._connections()
        self._tell(
            Hello(
                sender=self._rank,
                session=self._session,
                hosts=self._hosts,
                samples=self._samples,
                facts=self._facts,
            )
        )
        if self._session:
            self._tell(Ready(sender=self._rank, session=self._session))

    def _hear_all(self) -> None:
        while self._take(0.0):
            pass

    def _take(self, timeout_s: float) -> bool:
        got = self._transport.receive(timeout_s)
        if got is None:
            return False
        rank, frame = got
        try:
            letter = letters.decode(frame)
            self._counted["bytes received"] += letters.length(frame)
            if rank != SERVER or letter.sender != SERVER:
                raise DecodeError(f"only rank {SERVER} tells a site what to do, got a letter of {letter.sender}")
            self._follow(letter)
        except DecodeError as error:
            self._refused["no letter"] += 1
            _log.warning("refused a message of rank %d: %s", rank, error)
        return True

    def _follow(self, letter: Letter) -> None:
        self._heard_s = time.monotonic()
        match letter:
            case Welcome():
                self._begin(letter)
                return
            case Refusal(reason=reason):
                raise CompatibilityError(reason)
            case End(reason=reason) if not self._session:
                self._ended = reason or "it is over already"
                return
        if letter.session != self._session or self._made is None:
            self._refused["another session"] += 1
            return
        match letter:
            case Task(clients=clients):
                if strangers := sorted(set(clients) - set(self._hosts)):
                    raise DecodeError(f"this site hosts {list(self._hosts)}, got a task for client {strangers[0]}")
                if letter.overrules:
                    self._counted["overruled"] += sum(len(task.clients) for task in self._tasks)
                    self._tasks.clear()
                self._tasks.append(letter)
            case Saving(version=version):
                if version is not None:
                    self._made[1].saving(version)
            case End(reason=reason):
                self._ended = reason
            case _:
                raise DecodeError(f"a site is not told {type(letter).__name__}")

    def _begin(self, welcome: Welcome) -> None:
        self._invited = welcome.session
        if self._made is None:
            self._settings = welcome.settings
            self._made = self._build(welcome.settings)
        elif welcome.settings != self._settings:
            raise CompatibilityError(
                "a server that comes back must have the settings of the one before it, got "
                f"{dict(welcome.settings)!r:.300} after {dict(self._settings)!r:.300}; start this site again if "
                "another job is meant"
            )
        if welcome.session != self._session:
            self._tasks.clear()
            self._made[1].follow(welcome.session, welcome.version)
            self._made[1].write()
            self._session = welcome.session
        self._tell(Ready(sender=self._rank, session=self._session))

    # -- the server's loss ---------------------------------------------------------------------------------------------

    def _connections(self) -> int:
        connections = getattr(self._transport, "connections", None)
        return 0 if connections is None else int(connections(SERVER))

    def _look_after(self) -> None:
        if self._transport.closed:
            raise DistoptError(
                f"the transport of the site on rank {self._rank} was closed while it takes part, so it hears no more; "
                "close it after take_part has returned"
            )
        now = time.monotonic()
        lost = SERVER in self._transport.lost
        if lost and not self._may_return:
            raise PeerLostError(f"the server, rank {SERVER}, is gone: the job cannot go on without it", (SERVER,))
        patience_s = self._patience_s if self._session else self._wait_s
        if now - self._heard_s > patience_s:
            was = "is gone" if lost else "has said nothing"
            raise PeerLostError(
                f"the server, rank {SERVER}, {was} for {patience_s:g} s; does it call serve, and can this process "
                "reach it?",
                (SERVER,),
            )
        waits = not self._session and now - self._said_hello_s > _HELLO_S
        if not self._has_come_back() and waits and self._may_return and not lost:
            self._say_hello()
        if now - self._probed_s > _PROBE_S:
            self._probed_s = now
            self._transport.probe(SERVER)


def _checked(sent: Broadcast, trainer: Trainer) -> Broadcast:
    """The broadcast, if it is of the trainer's model.

    Raises:
        ConfigError: It is not.
    """
    layout = trainer.layout
    lengths = {"the model": layout.num_elements, **dict.fromkeys(sent.extras, layout.num_trained)}
    for name, vector in {"the model": sent.model, **sent.extras}.items():
        if vector.numel() != lengths[name] or vector.dtype != layout.dtype:
            raise ConfigError(
                f"{name} of the server must have {lengths[name]} elements of {layout.dtype}, got {vector.numel()} of "
                f"{vector.dtype}; both sides must build the same model"
            )
    return sent
