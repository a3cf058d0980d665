"""Letters come back as they were, and nothing else that arrives is one: no frame raises anything but `DecodeError`."""

import dataclasses
import json
import os
import random

import pytest
import torch

from distopt.comm import Message, message
from distopt.errors import DecodeError
from distopt.federated import Broadcast, FedAvg, Reply, UplinkCompression
from distopt.federated.network import letters
from distopt.federated.network.letters import (
    Answer,
    End,
    Failed,
    Hello,
    Kind,
    Ready,
    Refusal,
    Saving,
    Task,
    Welcome,
)
from distopt.federated.network.packing import pack, unpack

SESSION = "00ff00ff00ff00ff"
_random = torch.Generator().manual_seed(0)
VECTOR = torch.randn(7, generator=_random)
BROADCAST = Broadcast(version=3, model=VECTOR, extras={"control": VECTOR[:5]})
REPLY = Reply(client=4, version=3, num_samples=9, num_steps=2, tensors={"delta": VECTOR[:5], "rest": VECTOR[5:]})
LETTERS = [
    Hello(sender=2, session="", hosts=[0, 4], samples=[7, 9], facts={"protocol": 1, "model": ["a [3]"]}),
    Welcome(sender=0, session=SESSION, version=12, settings={"seed": 3, "uplink": None}),
    Refusal(sender=0, session=SESSION, reason="no"),
    Ready(sender=2, session=SESSION),
    Failed(sender=2, session=SESSION, reason="ZeroDivisionError: é"),
    Task(sender=0, session=SESSION, saved=2, overrules=True, clients=[1, 5], broadcast=BROADCAST),
    Answer(sender=2, session=SESSION, reply=REPLY),
    Saving(sender=0, session=SESSION, version=4),
    Saving(sender=0, session=SESSION, version=None),
    End(sender=0, session=SESSION, reason=""),
]


def plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if dataclasses.is_dataclass(value):
        named = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value).__name__, named
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


@pytest.mark.parametrize("letter", LETTERS, ids=lambda letter: type(letter).__name__)
def test_a_letter_comes_back_as_it_was(letter):
    frame = letters.encode(letter)
    assert plain(letters.decode(frame)) == plain(letter)
    longer = torch.cat([frame, torch.full((100,), 7, dtype=torch.uint8)])  # a receiver's buffer
    assert plain(letters.decode(longer)) == plain(letter)


def text(content):
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


NUMBERS = torch.tensor([1, 2])
TASK = {"session": "", "saved": 0, "overrules": True, "extras": []}
ANSWER = {"session": "", "client": 1, "samples": 1, "steps": 1, "names": ["delta"], "packed": []}


@pytest.mark.parametrize(
    ("kind", "round", "tensors", "numbers", "said"),
    [
        (1, 0, (text({"session": ""}),), (), "of a kind in"),
        (Kind.READY, 0, (), (), "1 to 16 tensors"),
        (Kind.READY, 0, (text({"session": ""}),), (1.0,), "no numbers"),
        (Kind.READY, 0, (text({"session": ""}),) * 17, (), "1 to 16 tensors"),
        (Kind.READY, 0, (text({"session": ""}).view(1, -1),), (), "are flat"),
        (Kind.READY, 0, (text({"session": ""}).float(),), (), "text is at most"),
        (Kind.READY, 0, (text(b"{"),), (), "is JSON"),
        (Kind.READY, 0, (text(b"[" * 100_000),), (), "is JSON"),
        (Kind.READY, 0, (text(b"\xff\xfe\xfa"),), (), "is JSON"),
        (Kind.READY, 0, (text([1]),), (), "JSON object, got a list"),
        (Kind.READY, 0, (text({}),), (), "session of a letter is of str, got None"),
        (Kind.READY, 0, (text({"session": 3}),), (), "session of a letter is of str, got 3"),
        (Kind.READY, 0, (text({"session": "x" * 65}),), (), "at most 64 characters"),
        (Kind.READY, 0, (text({"session": ""}), VECTOR), (), "has 0 tensors of values, got 1"),
        (Kind.FAILED, 0, (text({"session": "", "reason": 1}),), (), "reason of a letter is of str"),
        (Kind.HELLO, 0, (text({"session": "", "facts": {}}), NUMBERS, NUMBERS[:1]), (), "for each client, got 1 for 2"),
        (Kind.HELLO, 0, (text({"session": "", "facts": {}}), NUMBERS * 0, NUMBERS), (), "for each client"),
        (Kind.HELLO, 0, (text({"session": "", "facts": {}}), -NUMBERS, NUMBERS), (), "numbers from 0 to"),
        (Kind.HELLO, 0, (text({"session": "", "facts": {}}), VECTOR, NUMBERS), (), "is a list of int64"),
        (Kind.HELLO, 0, (text({"session": "", "facts": []}), NUMBERS, NUMBERS), (), "facts of a letter is of dict"),
        (Kind.TASK, 0, (text(TASK),), (), "1 tensors of values, got 0"),
        (Kind.TASK, 0, (text(TASK), NUMBERS, VECTOR.int()), (), "floating-point"),
        (Kind.TASK, -1, (text(TASK), NUMBERS, VECTOR), (), "a version is from 0"),
        (Kind.TASK, 0, (text({**TASK, "saved": True}), NUMBERS, VECTOR), (), "saved of a letter is of int, got True"),
        (Kind.TASK, 0, (text({**TASK, "saved": -1}), NUMBERS, VECTOR), (), "saved of a letter is from 0"),
        (Kind.TASK, 0, (text({**TASK, "extras": ["c", "c"]}), NUMBERS, VECTOR, VECTOR, VECTOR), (), "different ones"),
        (Kind.TASK, 0, (text({**TASK, "extras": [1]}), NUMBERS, VECTOR, VECTOR), (), "short names"),
        (Kind.TASK, 0, (text(TASK), NUMBERS * 0, VECTOR), (), "each client once"),
        (Kind.REPLY, 0, (text({**ANSWER, "packed": ["delta"]}), VECTOR), (), "what is packed are bytes"),
        (Kind.REPLY, 0, (text({**ANSWER, "packed": ["rest"]}), VECTOR), (), "what is packed are bytes"),
        (Kind.REPLY, 0, (text({**ANSWER, "client": 1.0}), VECTOR), (), "client of a letter is of int"),
        (Kind.REPLY, 0, (text({**ANSWER, "client": 2**60}), VECTOR), (), "client of a letter is from 0"),
        (Kind.REPLY, 0, (text(ANSWER), VECTOR, VECTOR), (), "has 1 tensors of values, got 2"),
        (Kind.SAVING, -2, (text({"session": ""}),), (), "a version is from 0"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_no_letter(kind, round, tensors, numbers, said):
    with pytest.raises(DecodeError, match=said):
        letters.decode(message.encode(Message(kind, round, 1, tensors, numbers)))


def mutated(rng, frame):
    """A frame with a few bytes changed; half of them with a header that is right about its checksum."""
    changed = bytearray(frame)
    for _ in range(rng.choice([1, 1, 2, 5, 40])):
        changed[rng.randrange(len(changed))] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed)) :]
    if rng.random() < 0.5 and len(changed) >= 40:
        header = int.from_bytes(changed[24:28], "little")
        if 40 <= header <= len(changed):
            crc = message.zlib.crc32(bytes(changed[: header - 4]))
            changed[header - 4 : header] = crc.to_bytes(4, "little")
    return bytes(changed)


def fuzz(count, seed):
    """How many of so many inputs were letters, refused, and of replies none that could be unpacked."""
    rng = random.Random(seed)
    uplink, algorithm = UplinkCompression(density=0.4), FedAvg()
    reply, _ = uplink.compress(algorithm, REPLY, {"unsent delta": torch.zeros(5)})
    frames = [bytes(letters.encode(letter).tolist()) for letter in LETTERS]
    frames.append(bytes(letters.encode(pack(reply, algorithm, uplink, sender=2, session=SESSION)).tolist()))
    counts = {"letters": 0, "refused": 0, "payloads": 0}
    for _ in range(count):
        whole = mutated(rng, rng.choice(frames)) if rng.random() < 0.95 else rng.randbytes(rng.randrange(300))
        try:
            letter = letters.decode(torch.frombuffer(bytearray(whole or b"\0"), dtype=torch.uint8))
            counts["letters"] += 1
            if isinstance(letter, Answer):
                unpack(letter, algorithm, uplink, num_trained=5, dtype=torch.float32)
        except DecodeError:
            counts["refused"] += 1
    return counts


def test_nothing_but_letters_is_one():
    counts = fuzz(10_000, 1)
    assert counts["letters"] > 100  # what was changed was a value
    assert counts["refused"] > 5_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_but_letters_is_one_in_many():
    assert fuzz(100_000, int(os.environ.get("DISTOPT_FUZZ_SEED", "2")))["refused"] > 50_000


def test_a_compressed_reply_travels_as_its_payload():
    uplink, algorithm = UplinkCompression(density=0.4), FedAvg()
    reply, _ = uplink.compress(algorithm, REPLY, {"unsent delta": torch.zeros(5)})
    answer = pack(reply, algorithm, uplink, sender=2, session=SESSION)
    assert answer.reply.tensors["delta"].numel() == uplink.layout(5).nbytes
    found = unpack(letters.decode(letters.encode(answer)), algorithm, uplink, num_trained=5, dtype=torch.float32)
    assert plain(found) == plain(reply)
    with pytest.raises(DecodeError, match="are not compressed"):
        unpack(answer, algorithm, None, num_trained=5, dtype=torch.float32)
    infinite = dataclasses.replace(reply, tensors={**reply.tensors, "delta": torch.full((5,), torch.inf)})
    sent = pack(infinite, algorithm, uplink, sender=2, session=SESSION)
    received = unpack(sent, algorithm, uplink, num_trained=5, dtype=torch.float32)
    assert torch.isinf(received.tensors["delta"]).all()  # 16 bits would make it finite, and it would count
    assert received.wire_bytes == reply.wire_bytes
