"""What reaches the master and is not what it should be is refused and counted, and changes nothing."""

import threading
import time

import pytest
import torch
from coded_job import build, finish, parameters, sgd, start, sum_loss, together, train, uncoded

from distopt.coding import Batches, GradientCoding, attachment, flat, fractional, handshake, placement, sharded
from distopt.coding.answer import Answer, TaskResult, to_message
from distopt.coding.master import WINDOW
from distopt.coding.orders import Kind, reason_message, tasks_of, text_message, text_of
from distopt.comm import InProcess, Message, message
from distopt.errors import DecodeError, PeerLostError

STEPS = 10


def answer_for(round, *, sender=1, length=None, dtype=torch.float64, factor=1.0):
    model = build()
    length = sum(p.numel() for p in model.parameters()) if length is None else length
    result = TaskResult(
        1.0, 40.0, (0.0, 0.0), [factor * torch.ones(length, dtype=dtype)], torch.ones(4, dtype=torch.uint8)
    )
    return message.encode(to_message(Kind.ANSWER, round, sender, Answer(0.1, [result])))


class Dead(Exception):
    """What ends the thread of a rank that plays dead."""


WRONG = {
    "garbage": lambda step: torch.full((200,), 7, dtype=torch.uint8),
    "a header that is damaged": lambda step: answer_for(step).clone().index_fill_(0, torch.tensor([9]), 255),
    "another sender": lambda step: answer_for(step, sender=2),
    "a shape": lambda step: answer_for(step, length=5),
    "a dtype": lambda step: answer_for(step, dtype=torch.float32),
    "a round to come": lambda step: answer_for(step + 5),
    "a kind": lambda step: message.encode(text_message(Kind.WELCOME, step, 1, "")),
    "no kind at all": lambda step: message.encode(Message(777, step, 1)),
}


GROUP_OF_RANK_1 = next(
    i for i, members in enumerate(fractional(4, 1).groups) if placement(fractional(4, 1), 4 * ["x"])[1] in members
)


def decoded_for(step, *, slice):
    length = sum(p.numel() for p in build().parameters())
    cut = length * (slice + 1) // 2 - length * slice // 2
    tensors = (torch.ones(4, dtype=torch.uint8), torch.full((cut,), 1e6, dtype=torch.float64))
    return message.encode(Message(Kind.DECODED, step, 1, tensors, (1.0, 40.0, float(slice))))


def slice_for(step, *, slices=3, length=3):
    numbers = (1.0, 40.0, 0.1, 0.0, 0.0)[: slices + 2]
    tensors = (torch.ones(4, dtype=torch.uint8), torch.ones(length, dtype=torch.float64))
    return message.encode(Message(Kind.SLICE, step, 1, tensors, numbers))


WRONG_SLICES = {
    "garbage": WRONG["garbage"],
    "another sender": WRONG["another sender"],
    "a kind": WRONG["a kind"],
    "a shape": lambda step: slice_for(step),
    "too few numbers": lambda step: slice_for(step, slices=1),
    "a slice that another group decodes": lambda step: decoded_for(step, slice=1 - GROUP_OF_RANK_1),
    "a slice that there is not": lambda step: message.encode(Message(Kind.DECODED, step, 1, (), (1.0, 40.0, 99.0))),
}
CASES = [("first", wrong) for wrong in WRONG] + [("sharded", wrong) for wrong in WRONG_SLICES]


@pytest.mark.parametrize(("master", "wrong"), CASES)
def test_a_wrong_message_is_refused_and_counted_and_never_decoded(wrong, master):
    make = (WRONG if master == "first" else WRONG_SLICES)[wrong]

    def interfere(rank, step):
        if rank.end.rank == 1 and step == 3:
            rank.end.send(0, make(step))

    ranks = train(5 if master == "first" else 4, STEPS, before=interfere, master=master)
    assert ranks[0].stats["refused_messages"] == 1
    assert [worker["refused"] for worker in ranks[0].stats["workers"]].index(1) == (0 if master == "first" else 1)
    for rank in ranks:
        assert (parameters(rank.models[0]) - uncoded([build()], STEPS)[0]).abs().max() <= 1e-12


def test_an_answer_that_was_given_already_is_refused():
    def again(rank, step):
        if rank.end.rank == 1 and step == 4:
            rank.end.send(0, answer_for(3, factor=1e6))

    ranks = train(5, STEPS, before=again)
    assert ranks[0].stats["refused_messages"] == 1
    assert (parameters(ranks[0].models[0]) - uncoded([build()], STEPS)[0]).abs().max() <= 1e-12


def test_a_worker_refuses_what_is_not_from_the_master():
    def interfere(rank, step):
        if rank.end.rank == 1 and step == 2:
            rank.end.send(2, answer_for(step))
            rank.end.send(2, torch.zeros(100, dtype=torch.uint8))

    ranks = train(5, STEPS, before=interfere)
    assert ranks[2].stats["refused_messages"] == 2


def test_late_answers_are_drained_and_counted():
    def slow(rank, step):
        if rank.end.rank == 1 and step == 2:
            time.sleep(0.1)

    def steady(rank, step):
        slow(rank, step)
        if rank.end.rank == 0:
            time.sleep(0.03)  # the late answer comes while the training goes on

    ranks = train(5, STEPS, before=steady)
    worker = ranks[0].stats["workers"][0]
    assert worker["late"] + worker["unanswered"] >= 1
    assert ranks[0].stats["saved_s"] > 0
    assert ranks[0].stats["refused_messages"] == 0


def test_what_is_kept_for_a_worker_that_does_not_answer_is_bounded():
    """A worker that says hello and then takes everything and never answers, beside three that do."""
    ends = InProcess.connect(5)
    results = {}

    def work(end):
        model = build()
        with GradientCoding().attach(model, sgd(model), batches=Batches(120, 40), transport=end) as coded:
            for _ in coded.steps(30):
                coded.backward(lambda part: (model(torch.ones(len(part.samples), 6).double()) ** 2).sum())
            results[end.rank] = coded.stats()

    facts = attachment._facts(GradientCoding(), [flat.FlatModel(build())], Batches(120, 40))
    ends[4].send(0, message.encode(text_message(Kind.HELLO, 0, 4, {"facts": facts, "node": "x", "problem": None})))
    assert not together(work, ends[:4])
    kinds = []
    while (got := ends[4].receive(0.0)) is not None:
        said = message.decode(got[1])
        kinds.append(Kind(said.kind))
        if said.kind == Kind.TASKS:
            assert tasks_of(said)
    assert kinds.count(Kind.TASKS) == WINDOW
    assert kinds.count(Kind.PARAMETERS) == WINDOW
    assert kinds[-1] == Kind.END
    assert results[0]["workers"][3]["unanswered"] == 30


def test_past_s_lost_workers_training_ends_with_their_names():
    def die(rank, step):
        if rank.end.rank in (1, 3) and step == 4:  # fractional: the two members of one group
            rank.end.die()
            raise Dead

    ranks = finish(start(5, STEPS, before=die, code="fractional", deadline_s=5.0))
    error = ranks[0].error
    assert isinstance(error, DecodeError)
    assert error.missing == (0, 2)
    assert "workers 0, 2, ranks 1, 3 (its connection is gone)" in str(error)
    for rank in (2, 4):
        assert "the master has ended the training: DecodeError" in str(ranks[rank].error)


def test_past_s_lost_workers_nobody_waits_for_others_that_are_only_slow():
    over = threading.Event()

    def die(rank, step):
        if rank.end.rank in (1, 3) and step >= 4:
            rank.end.die()
            raise Dead
        if rank.end.rank == 2 and step >= 4:
            over.wait(60.0)

    ranks = start(5, STEPS, before=die, code="fractional", deadline_s=300.0)
    ranks[0].thread.join(20.0)
    has_ended = not ranks[0].thread.is_alive()
    over.set()
    assert has_ended
    finish(ranks)
    assert isinstance(ranks[0].error, DecodeError)
    assert ranks[0].error.missing == (0, 2)
    assert "worker 1" not in str(ranks[0].error)


def test_one_lost_worker_is_a_straggler_for_ever():
    def die(rank, step):
        if rank.end.rank == 2 and step == 4:
            rank.end.die()
            raise Dead

    ranks = finish(start(5, STEPS, before=die))
    assert ranks[0].error is None
    assert (parameters(ranks[0].models[0]) - uncoded([build()], STEPS)[0]).abs().max() <= 1e-12
    assert ranks[0].stats["gone"] == {1: "its connection is gone"}
    assert "gone: its connection is gone" in ranks[0].report


@pytest.mark.parametrize("how", ["error", "leaves"])
def test_a_worker_that_leaves_its_loop_says_so(how):
    """Nobody waits until the deadline for workers that are there, but do not take part any more."""

    def work(end):
        model = build()
        coding = GradientCoding(code="fractional")  # whose deadline is 300 s
        with coding.attach(model, sgd(model), batches=Batches(120, 40), transport=end) as coded:
            for step in coded.steps(10):
                if end.rank in (1, 3) and step >= 3:
                    if how == "leaves":
                        break
                    raise ValueError("no such file" + 100_000 * "\N{SNOWMAN}")
                coded.backward(lambda part: sum_loss(model, part.samples))

    errors = together(work, InProcess.connect(5), deadline_s=60.0)
    assert isinstance(errors[0], DecodeError)
    assert errors[0].missing == (0, 2)
    assert {"error": "ValueError: no such file", "leaves": "it has left the training"}[how] in str(errors[0])
    assert "the master has ended the training: DecodeError" in str(errors[2])


def test_a_reason_fits_into_every_frame():
    for text in (100_000 * "x", 100_000 * "\N{SNOWMAN}", 100_000 * "\U0001f3c3"):
        said = reason_message(Kind.FAILED, 3, 1, text)
        assert message.encode(said).numel() <= attachment._TEXT_BYTES
        assert text.startswith(text_of(said))
        assert len(text_of(said)) > 1000


def test_nothing_is_kept_of_a_gradient_that_is_taken(monkeypatch):
    """Each slice comes from two ranks, and one of them may come while the gradient is written."""
    write = flat.FlatModel.write_gradients

    def slowly(self, *arguments):
        time.sleep(0.02)  # the others' slices of this step come now
        write(self, *arguments)

    monkeypatch.setattr(flat.FlatModel, "write_gradients", slowly)
    for rank in train(4, STEPS, master="sharded"):
        assert rank.coded._role._decoded == {}
        assert rank.coded._role._waiting_bytes == 0


def test_a_sharded_rank_that_is_far_behind_is_left_behind(monkeypatch):
    """What is kept for it is bounded; the others go on."""
    monkeypatch.setattr(sharded, "_BACKLOG_BYTES", 0)
    others_ended = threading.Event()

    def pause(rank, step):
        if rank.end.rank == 1 and step == 2:
            others_ended.wait(60.0)
        if rank.end.rank != 1:
            time.sleep(0.002)  # the others stay together: nobody else falls 16 steps behind
            if step == 39:
                others_ended.set()

    ranks = finish(start(4, 40, before=pause, master="sharded"))
    assert isinstance(ranks[1].error, PeerLostError)
    assert "this rank, 1, has not applied the gradients of 16 steps" in str(ranks[1].error)
    for rank in (0, 2, 3):
        assert ranks[rank].error is None
        assert (parameters(ranks[rank].models[0]) - uncoded([build()], 40)[0]).abs().max() <= 1e-12


def test_silence_beyond_the_deadline_ends_the_training():
    def stall(rank, step):
        if rank.end.rank in (1, 3) and step == 2:
            time.sleep(2.0)

    ranks = finish(start(5, STEPS, before=stall, code="fractional", deadline_s=0.5))
    assert isinstance(ranks[0].error, DecodeError)
    assert ranks[0].error.missing == (0, 2)
    assert "no answer for 0.5" in str(ranks[0].error)


def test_a_worker_without_a_master_says_so():
    def die(rank, step):
        if rank.end.rank == 0 and step == 2:
            rank.end.die()
            raise Dead

    ranks = finish(start(4, STEPS, before=die))
    for rank in ranks[1:]:
        assert isinstance(rank.error, PeerLostError)
        assert rank.error.ranks == (0,)


def test_a_slice_of_a_rank_that_was_welcomed_earlier_is_kept():
    """Rank 1 has rank 2's slice before the master's welcome, which comes last: nothing of it may be lost."""
    ends = InProcess.connect(2)
    early = slice_for(0)
    ends[1].send(1, early)  # comes from rank 1 itself: any rank but the master
    ends[0].send(1, message.encode(text_message(Kind.WELCOME, 0, 0, {"refusal": None, "nodes": ["a", "b"]})))
    nodes, kept = handshake.greet(ends[1], {}, "b", None, 1.0)
    assert nodes == ["a", "b"]
    assert [(source, frame is early) for source, frame in kept] == [(1, True)]
