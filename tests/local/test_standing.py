"""Who is up to date after a meeting, from what the members say of themselves; and buffers as bytes."""

import torch

from distopt.comm.crew.assembly import Crew
from distopt.local.buffers import Buffers, as_bytes, from_bytes
from distopt.local.outer_exchange import Standing

OLD, CREW = [0, 3], [0, 4]


def said(done, line=OLD, tried=OLD):
    return {"done": done, "line": line, "tried": tried}


def standing(states, new=()):
    members = tuple(sorted([*states, *new]))
    states = {**states, **dict.fromkeys(new)}
    found = Standing.of(Crew(0, 5, members, 0, None, 9, new=tuple(new), states=states))
    return found.source, sorted(found.current), sorted(found.counted), sorted(found.missed)


def test_all_who_made_the_last_exchange_together_are_up_to_date():
    assert standing({0: said(8), 2: said(8, tried=CREW), 3: said(8)}) == (0, [0, 2, 3], [], [])


def test_who_was_cut_off_in_an_exchange_that_others_completed_was_counted():
    made, cut_off = said(9, CREW, CREW), said(8, OLD, CREW)
    assert standing({0: cut_off, 1: made, 2: made}) == (1, [1, 2], [0], [])


def test_who_was_in_another_crew_has_missed_it():
    made = said(9, CREW, CREW)
    assert standing({0: said(8, OLD, OLD), 1: made, 2: said(7, OLD, CREW)}) == (1, [1], [], [0, 2])


def test_of_two_parts_of_a_network_that_went_on_apart_the_lower_one_counts():
    assert standing({0: said(9, [0, 5]), 1: said(9, [1, 0]), 2: said(9, [0, 5])}) == (0, [0, 2], [], [1])


def test_who_is_new_takes_the_model_of_the_lowest_that_has_one():
    assert standing({1: said(4), 2: said(4)}, new=[0, 3]) == (1, [1, 2], [], [0, 3])


def test_bytes_are_the_tensors():
    tensors = [torch.randn(3, 2), torch.tensor(7), torch.tensor([True, False]), torch.randn(5).bfloat16()]
    for found, expected in zip(from_bytes(as_bytes(tensors), tensors), tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert as_bytes([]).numel() == 0


def test_buffers_become_the_mean_or_move_by_as_much_and_no_further():
    mine, theirs = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([3.0, 0.0, 2.0])
    buffers = Buffers([mine])
    sent = buffers.sent()
    mean = buffers.mean(torch.stack([sent, as_bytes([theirs])]))
    mine.copy_(torch.tensor([1.5, 0.5, 3.0]))  # it has gone on meanwhile
    buffers.become_(mean, sent)
    assert mine.tolist() == [2.0, 0.5, 3.0]
    buffers.become_(mean)
    assert mine.tolist() == [2.0, 2.0, 2.0]


def test_what_all_ranks_agree_in_stays_to_the_bit():
    mask, table = torch.full((3, 3), -torch.inf).triu(1), torch.rand(100, generator=torch.Generator().manual_seed(0))
    expected = [mask.clone(), table.clone()]
    buffers = Buffers([mask, table])
    sent = buffers.sent()
    mean = buffers.mean(torch.stack([sent] * 7))
    for meanwhile in (sent, None):
        buffers.become_(mean, meanwhile)
        assert torch.equal(mask, expected[0])
        assert torch.equal(table, expected[1])
