"""Every sample of an epoch once, whatever the sizes, the ranks, the workers and where a run was resumed."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from distopt.batch import GrowingBatchSampler
from distopt.errors import ConfigError, StateMismatchError


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return torch.tensor(i)


def make(length, rank=0, ranks=1, size=2, **options):
    return GrowingBatchSampler(length, batch_size=size, num_replicas=ranks, rank=rank, seed=5, **options)


def steps_of(sampler, loader=None):
    """Yields (plan, this rank's micro-batches) step by step, as the controller goes through a loader."""
    source = iter(sampler if loader is None else loader)
    for batch in source:
        plan = sampler.take()
        parts = [list(map(int, each)) for each in (batch, *(next(source) for _ in range(plan.micro_batches - 1)))]
        sampler.handed_out()
        yield plan, parts
    sampler.end_epoch()


@hypothesis.given(
    ranks=st.integers(1, 4),
    data=st.data(),
    size=st.integers(1, 7),
    at_least=st.integers(1, 2),
    drop_last=st.booleans(),
)
@hypothesis.settings(max_examples=60)
def test_an_epoch_has_every_sample_once_whatever_the_sizes(ranks, data, size, at_least, drop_last):
    size = max(size, at_least)
    length = data.draw(st.integers(ranks * (size if drop_last else at_least), 200))
    samplers = [make(length, rank, ranks, size, drop_last=drop_last) for rank in range(ranks)]
    for sampler in samplers:
        sampler.at_least = at_least
    growths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=6))
    seen = []
    expected_length = len(samplers[0])
    found = 0
    walks = [steps_of(sampler) for sampler in samplers]
    for step, together in enumerate(zip(*walks, strict=True)):
        (plan, _), *_ = together
        found += plan.micro_batches
        assert all(other == plan for other, _ in together)  # the same step on every rank
        shares = [sum(map(len, parts)) for _, parts in together]
        assert sum(shares) == plan.samples
        assert max(shares) - min(shares) <= 1
        for _, parts in together:
            assert len(parts) == plan.micro_batches
            assert min(map(len, parts)) >= min(at_least, length // ranks)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            seen += [i for part in parts for i in part]
        if step < len(growths):
            more, micro = growths[step]
            for sampler in samplers:
                sampler.resize(sampler.batch_size + ranks * more, micro)
    assert len(set(seen)) == len(seen)
    if drop_last:
        assert length - len(seen) < samplers[0].batch_size
    else:
        assert sorted(seen) == list(range(length))
    if not growths:
        assert found == expected_length


def test_steps_have_the_size_that_was_set_but_for_the_last():
    sampler = make(99, ranks=2, size=5)
    sizes = []
    for plan, parts in steps_of(sampler):
        sizes.append((plan.samples, [len(part) for part in parts]))
        if len(sizes) == 2:
            sampler.resize(26, 5)
    assert sizes == [
        (10, [5]), (10, [5]), (26, [5, 4, 4]), (26, [5, 4, 4]), (27, [5, 5, 4]),
    ]  # fmt: skip  # one of 27 would have been too few for a step of their own


@pytest.mark.parametrize(("workers", "stop"), [(0, 1), (0, 4), (2, 4)])
def test_resumed_in_the_middle_of_an_epoch_to_the_same_steps(workers, stop):
    """Also where workers have fetched ahead when the size changes: those begun keep their sizes."""

    def run(sampler, begin, upto=None):
        loader = DataLoader(Numbers(90), batch_sampler=sampler, num_workers=workers)
        done = []
        step = begin
        for plan, parts in steps_of(sampler, loader):
            done.append((plan, parts))
            step += 1
            if step % 2 == 0:
                sampler.resize(sampler.batch_size + 2, 2)
            if step == upto:
                return done, sampler.state_dict()
        return done, sampler.state_dict()

    whole, _ = run(make(90), 0)
    first, state = run(make(90), 0, stop)
    resumed = make(90)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest, _ = run(resumed, stop)
    assert first + rest == whole


def test_epochs_follow_each_other_in_orders_of_their_own():
    sampler = make(30, size=4)
    first, second = ([parts for _, parts in steps_of(sampler)] for _ in range(2))
    assert first != second
    again = make(30, size=4)
    again.set_epoch(1)
    assert [parts for _, parts in steps_of(again)] == second
    again.set_epoch(1)  # once more from its beginning
    walk = steps_of(again)
    half = [next(walk)[1] for _ in range(3)]
    state = again.state_dict()
    resumed = make(30, size=4)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # the epoch under way goes on
    assert half + [parts for _, parts in steps_of(resumed)] == second
    assert next(steps_of(make(30, size=4, shuffle=False)))[1] == [[0, 1, 2, 3]]


def test_epochs_follow_each_other_without_a_controller_too():
    plain, steered = make(30, size=4), make(30, size=4)
    for _ in range(3):
        parts = [part for _, step in steps_of(steered) for part in step]
        assert list(plain) == parts
    plain.set_epoch(1)
    next(iter(plain))  # which is left
    assert list(plain) == plain_epoch(1)
    ahead = make(30, size=4)
    batches = list(ahead)  # a loader has fetched the whole epoch before its first step
    ahead.take(), ahead.handed_out()
    assert (ahead.state_dict()["over"], ahead.state_dict()["position"]) == (False, len(batches[0]))


def plain_epoch(epoch):
    sampler = make(30, size=4)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_another_number_of_ranks_goes_on_behind_the_same_sample():
    walk = steps_of(sampler := make(50, ranks=2, size=3))
    next(walk), next(walk)
    state = sampler.state_dict()
    seen = []
    for rank in range(4):
        other = make(50, rank, ranks=4, size=3)
        other.load_state_dict(state)
        assert other.batch_size == 8  # 6, rounded up
        seen += [i for _, parts in steps_of(other) for part in parts for i in part]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(5))
    assert sorted(seen) == sorted(order[12:].tolist())


def test_bad_input():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(5))

    class Lengthless(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return i

    with pytest.raises(ConfigError, match=r"got Stream, an iterable data set.*__getitem__"):
        GrowingBatchSampler(Stream(), batch_size=2)
    with pytest.raises(ConfigError, match=r"must have a length, got Lengthless.*give its length"):
        GrowingBatchSampler(Lengthless(), batch_size=2)
    with pytest.raises(ConfigError, match=r"batch_size must be an integer of at least 1, got 0"):
        make(10, size=0)
    with pytest.raises(ConfigError, match=r"rank must be below num_replicas, got 2 of 2"):
        make(10, 2, 2)
    with pytest.raises(ConfigError, match=r"a sample for each rank, got 3 for 4 ranks"):
        make(3, 0, 4)
    with pytest.raises(ConfigError, match=r"samples of a step, got 10 for 2 ranks of 6: no step would be left"):
        make(10, 0, 2, size=6, drop_last=True)
    with pytest.raises(StateMismatchError, match=r"agree in length, got 20 then and 30 now"):
        make(30).load_state_dict(make(20).state_dict())
