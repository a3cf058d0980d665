"""Before the first round: do all ranks mean the same training? The master asks, compares and answers.

Nothing of this needs a collective, so it works over any transport, and a rank with an error of its own says so instead
of leaving the others waiting.
"""

import time
from typing import Any

from torch import Tensor

from distopt.coding.orders import Kind, text_message, text_of
from distopt.comm import Message, Transport, message
from distopt.errors import CompatibilityError, DesyncError, DistoptError, PeerLostError

MASTER = 0

Facts = dict[str, Any]  # what must be equal on all ranks, by name


def greet(
    transport: Transport, facts: Facts, node: object, problem: DistoptError | None, timeout_s: float
) -> tuple[list[Any], list[tuple[int, Tensor]]]:
    """A worker's side; returns the nodes of all ranks, in rank order, and frames of ranks that were welcomed earlier.

    Args:
        transport: To the master.
        facts: Of this rank.
        node: Where this rank runs: equal on ranks of one node.
        problem: Why this rank cannot take part, if so.
        timeout_s: How long the master waits for each rank; twice that is waited for the master.

    Raises:
        DistoptError: `problem`, or the ranks do not fit together.
        PeerLostError: The master does not answer.
    """
    content = {"facts": facts, "node": node, "problem": None if problem is None else str(problem)}
    transport.send(MASTER, message.encode(text_message(Kind.HELLO, 0, transport.rank, content)))
    if problem is not None:
        raise problem
    patience_s = 2 * timeout_s  # the master waits for others as long as that, and then says for whom
    end = time.monotonic() + patience_s
    early: list[tuple[int, Tensor]] = []  # between two ranks messages keep their order, among three they do not
    while True:
        got = transport.receive(max(0.0, end - time.monotonic()))
        if got is None:
            raise PeerLostError(f"the master, rank 0, did not answer within {patience_s:g} s; did it start?", (MASTER,))
        if got[0] == MASTER and (answer := message.decode(got[1])).kind == Kind.WELCOME:
            break
        early.append(got)
    told = text_of(answer)
    if told["refusal"]:
        raise DesyncError(str(told["refusal"]))
    return [_hashable(node) for node in told["nodes"]], early


def gather(
    transport: Transport, facts: Facts, own_node: object, problem: DistoptError | None, timeout_s: float
) -> list[Any]:
    """The master's side; returns the nodes of all ranks, in rank order.

    Raises:
        DistoptError: `problem`, that of another rank, or the ranks do not fit together; all ranks raise.
    """
    nodes: dict[int, Any] = {MASTER: own_node}
    refusal = None if problem is None else f"rank 0: {problem}"
    end = time.monotonic() + timeout_s
    missing = set(range(transport.size)) - {MASTER}
    while missing:
        got = _next(transport, max(0.0, end - time.monotonic()))
        if got is None:
            names = ", ".join(map(str, sorted(missing)))
            refusal = refusal or f"ranks {names} did not say hello within {timeout_s:g} s"
            break
        source, said = got
        if said.kind != Kind.HELLO or source not in missing:
            continue
        missing.discard(source)
        content = text_of(said)
        nodes[source] = content["node"]
        if content["problem"] is not None:
            refusal = refusal or f"rank {source}: {content['problem']}"
        else:
            refusal = refusal or _difference(facts, content["facts"], source)
    in_order = [nodes.get(rank) for rank in range(transport.size)]
    frame = message.encode(text_message(Kind.WELCOME, 0, MASTER, {"refusal": refusal, "nodes": in_order}))
    for rank in range(1, transport.size):
        transport.send(rank, frame)
    if problem is not None:
        raise problem
    if refusal is not None:
        raise (PeerLostError(refusal, sorted(missing)) if missing else CompatibilityError(refusal))
    return [_hashable(node) for node in in_order]


def _difference(ours: Facts, theirs: Facts, rank: int) -> str | None:
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            return (
                f"ranks 0 and {rank} must have the same {name}, got {ours.get(name)!r} and {theirs.get(name)!r}; build "
                "model, batches and configuration alike on every rank, from the same seed"
            )
    return None


def _next(transport: Transport, timeout_s: float) -> tuple[int, Message] | None:
    got = transport.receive(timeout_s)
    return None if got is None else (got[0], message.decode(got[1]))


def _hashable(node: Any) -> Any:
    return tuple(node) if isinstance(node, list) else node
