"""Arbitrary bytes, and valid ones that were changed, for everything that reads from a network.

What comes of them is a refusal that is counted, or what was really said: no other exception, no other frame, and no
memory by what a length announces. 10,000 inputs each in the default run, 100,000 in the slow one.
"""

import random
import socket
import struct
import zlib

import pytest
import torch

from distopt.comm import InProcess, Message, Sealed, message
from distopt.comm.session import RefusedError, Session, derive_key
from distopt.comm.tcp import connection, handshake
from distopt.comm.tcp.connection import Connection
from distopt.comm.tcp.handshake import Deadline
from distopt.errors import DecodeError
from stars import SECRET

MAX_BYTES = 1 << 16
COUNTS = pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
INTERESTING = (0, 1, 2, 63, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def tensor_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def changed(generator, valid):
    """Bytes that are not those of `valid`, but may be close to one of them."""
    data = bytearray(generator.choice(valid))
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        at = generator.randrange(len(data) + 1)
        what = generator.randrange(8)
        if what == 0:
            data = bytearray(generator.randbytes(generator.choice((0, 1, 16, 64, 65, 200))))
        elif what == 1:
            del data[at:]
        elif what == 2:
            data += generator.randbytes(generator.randrange(1, 80))
        elif what == 3:
            del data[at : at + generator.randrange(1, 20)]
        elif what == 4:
            data[at:at] = generator.randbytes(generator.randrange(1, 20))
        elif what == 5:
            other = generator.choice(valid)
            data[at:] = other[generator.randrange(len(other) + 1) :]
        elif what == 6:
            form = generator.choice("BHIQ")
            value = generator.choice(INTERESTING) % 256 ** struct.calcsize(form)
            if at + struct.calcsize(form) <= len(data):
                struct.pack_into("<" + form, data, at, value)
        elif at < len(data):
            data[at] ^= 1 << generator.randrange(8)
    return bytes(data)


# -- messages --------------------------------------------------------------------------------------------------------

MESSAGES = [
    Message(1, 2, 3),
    Message(4, 17, 1, (torch.ones(3), torch.zeros(2, 2, dtype=torch.int64)), (1.5, 2.5)),
    Message(65535, -1, 2**32 - 1, (torch.tensor(1.0), torch.empty(0, 5, dtype=torch.bfloat16)), ()),
    Message(7, 2**40, 2, tuple(torch.arange(n).to(torch.uint8) for n in range(8)), tuple(map(float, range(20)))),
]


def with_a_checksum_that_fits(data):
    """The header is as its writer meant it: what it describes is all there is to refuse."""
    data = bytearray(data)
    if len(data) >= 40:
        end = min(max(40, struct.unpack_from("<I", data, 24)[0]), len(data))
        struct.pack_into("<I", data, end - 4, zlib.crc32(data[: end - 4]))
    return bytes(data)


@COUNTS
def test_a_message_is_refused_or_lies_within_its_frame(count):
    generator = random.Random(count)
    valid = [message.encode(each).numpy().tobytes() for each in MESSAGES]
    refused = 0
    for number in range(count):
        data = changed(generator, valid)
        frame = tensor_of(with_a_checksum_that_fits(data) if number % 2 else data)
        try:
            decoded = message.decode(frame)
        except DecodeError:
            refused += 1
            continue
        for tensor in decoded.tensors:
            assert tensor.untyped_storage().data_ptr() == frame.untyped_storage().data_ptr()
        assert sum(tensor.nbytes for tensor in decoded.tensors) + 8 * len(decoded.numbers) <= frame.numel()
        assert message.length(frame) <= frame.numel()
    assert count > refused > 0.5 * count


def test_the_offsets_of_the_header_are_those_above():
    frame = message.encode(MESSAGES[1])
    assert with_a_checksum_that_fits(frame.numpy().tobytes()) == frame.numpy().tobytes()


@pytest.mark.parametrize("shape", [(2**62, 2**62, 0), (0, 2**62), (2**63 - 1, 2), (0, -1)])
def test_shapes_that_torch_cannot_make_are_refused_also_where_they_are_empty(shape):
    header = 36 + 2 + 8 * len(shape) + 4
    data = bytearray(128)
    message._PREFIX.pack_into(data, 0, b"DOPT", 1, 1, 0, 0, 1, 0, header, 128)
    struct.pack_into(f"<BB{len(shape)}q", data, 36, 5, len(shape), *shape)
    with pytest.raises(DecodeError, match="does not hold"):
        message.decode(tensor_of(with_a_checksum_that_fits(data)))


# -- sealed frames ---------------------------------------------------------------------------------------------------


class Recorder(InProcess):
    def send(self, destination, frame):
        self.seen.append(frame.numpy().tobytes())
        super().send(destination, frame)


def recorded():
    """Two sealed ends that have talked, and all that they have said."""
    wires = Recorder.connect(2)
    seen = wires[0].seen = wires[1].seen = []
    ends = [Sealed(wire, SECRET) for wire in wires]
    for length in (0, 1, 64, 300):
        for end in ends:
            end.send(1 - end.rank, torch.full((length,), length % 251, dtype=torch.uint8))
            assert ends[1 - end.rank].receive(20.0) is not None
    return ends, wires, list(seen)


@COUNTS
def test_sealed_ends_hand_on_nothing_that_was_not_said_to_them(count):
    generator = random.Random(count)
    ends, wires, valid = recorded()
    sessions = [(end._peers[1 - end.rank].outgoing, end._peers[1 - end.rank].incoming) for end in ends]
    before = [sum(end.refused.values()) for end in ends]
    try:
        for number in range(count):
            target = number % 2
            words = changed(generator, valid)  # some are copies: they are refused or change nothing as well
            InProcess.send(wires[1 - target], target, tensor_of(words))
            if number % 500 == 499:
                for end, wire in zip(ends, wires, strict=True):
                    while not wire._inboxes[end.rank].empty():
                        assert end._thread.is_alive()
        for end in ends:
            assert end.receive(0.3) is None
        for end, (outgoing, incoming) in zip(ends, sessions, strict=True):
            peer = end._peers[1 - end.rank]
            assert (peer.outgoing, peer.incoming) == (outgoing, incoming)
            end.send(1 - end.rank, torch.ones(3, dtype=torch.uint8))
            assert ends[1 - end.rank].receive(20.0)[1].tolist() == [1, 1, 1]
        assert sum(sum(end.refused.values()) for end in ends) - sum(before) > 0.9 * count
        assert set(ends[0].refused) <= {"garbage", "too long", "unauthenticated", "unknown session", "replayed"}
    finally:
        for end in ends:
            end.close(0.0)


# -- TCP -------------------------------------------------------------------------------------------------------------


def stream_of_records():
    key = derive_key(SECRET, "fuzz")
    session = Session(key)
    frames = [bytes([length % 251]) * length for length in (0, 1, 64, 300)]
    return key, frames, [session.seal(1, memoryview(frame)) + frame for frame in frames]


@COUNTS
def test_a_connection_hands_on_what_was_said_up_to_what_was_not(count, monkeypatch):
    generator = random.Random(count)
    key, frames, records = stream_of_records()
    valid = [b"".join(records), *(b"".join(records[:n]) for n in (1, 2, 3)), *records]
    largest = [0]
    real = torch.empty
    monkeypatch.setattr(
        connection.torch, "empty", lambda size, **options: largest.append(size) or real(size, **options)
    )
    refused = delivered = 0
    for _ in range(count):
        ours, theirs = socket.socketpair()
        theirs.sendall(changed(generator, valid))
        theirs.close()
        link = Connection(ours, Session(key), Session(key), max_frame_bytes=MAX_BYTES, max_pending_bytes=MAX_BYTES)
        got = []
        try:
            while (record := link.read()) is not None:
                got.append(record[1].numpy().tobytes())
        except (RefusedError, OSError):
            refused += 1
        finally:
            link.close()
        assert got == frames[: len(got)]
        delivered += len(got)
    assert refused > 0.5 * count
    assert delivered > 0
    assert max(largest) <= MAX_BYTES


@COUNTS
def test_no_handshake_comes_of_what_was_not_said_in_it(count):
    generator = random.Random(count)
    hello = handshake._sealed(
        SECRET, "hello", b"", handshake._HELLO, (b"DTCP", 1, True, 1, 2, generator.randbytes(handshake.NONCE_BYTES))
    )
    tag = generator.randbytes(32)
    reasons = set()
    for _ in range(count):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(changed(generator, [hello + tag, hello, tag]))
            theirs.shutdown(socket.SHUT_WR)
            try:
                handshake.answer(ours, Deadline(20.0), size=2, secret=SECRET, is_taken=lambda rank: False)
            except RefusedError as refusal:
                reasons.add(refusal.reason)
            except OSError:
                pass
            else:
                pytest.fail("somebody without the secret was let in")
    assert reasons == {"garbage", "ended early", "unauthenticated", "other version"}


@COUNTS
def test_no_peer_believes_an_answer_that_no_server_gave(count):
    generator = random.Random(count)
    fields = (b"DTCP", 1, 0, 1, 2, generator.randbytes(handshake.NONCE_BYTES))
    answer = handshake._sealed(SECRET, "answer", generator.randbytes(80), handshake._ANSWER, fields)
    answers = [answer]
    for verdict in range(9):
        said = (*fields[:2], verdict, *fields[3:])
        answers.append(handshake._sealed(None, "answer", b"", handshake._ANSWER, said))
    for _ in range(count):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(changed(generator, answers))
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises((handshake.NotYetError, OSError)):
                handshake.ask(ours, Deadline(20.0), rank=1, size=2, secret=SECRET)
