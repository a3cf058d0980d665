"""Who works when, by hand; and that the weights of the asynchronous algorithms add up to each client's importance."""

import itertools
import math

import numpy as np
import pytest
import torch

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    AfterArrivals,
    AsyncFedAvg,
    ConstantDelays,
    Everybody,
    EveryInterval,
    ExponentialDelays,
    FedAsync,
    FedBuff,
    FedFix,
    Reply,
    Server,
    Synchronous,
    UniformSampling,
)
from distopt.federated.schedule import make_schedule

TEN = ConstantDelays(mean_s=0.2, slowest=5.0)  # ten clients of 0.2 to 1.0 s
TIMES = tuple(np.linspace(0.2, 1.0, 10).tolist())


def schedule(pacing, num_clients, delays, participation=None, seed=0):
    process = (participation or Everybody()).begin(num_clients, seed)
    return make_schedule(pacing, process, delays and delays.begin(num_clients, seed), seed)


def rounds(pacing, num_clients, delays, count, **settings):
    """(started, answers, time) of each round."""
    made = schedule(pacing, num_clients, delays, **settings)
    found = []
    for version in range(count):
        planned = made.next_round(version)
        found.append((planned.started, planned.answers, made.time_s))
    return found


THREE = ConstantDelays(mean_s=(1.0, 2.0, 5.0))


def test_synchronous_rounds_last_as_long_as_the_slowest():
    everybody = [0, 1, 2]
    assert rounds(Synchronous(), 3, THREE, 2) == [
        (everybody, [(0, 0), (1, 0), (2, 0)], 5.0),
        (everybody, [(0, 1), (1, 1), (2, 1)], 10.0),
    ]
    assert rounds(Synchronous(), 3, None, 1)[0][2] is None


def test_intervals_by_hand():
    assert rounds(EveryInterval(seconds=2.0), 3, THREE, 4) == [
        ([0, 1, 2], [(0, 0), (1, 0)], 2.0),
        ([0, 1], [(0, 1), (1, 1)], 4.0),
        ([0, 1], [(0, 2), (2, 0), (1, 2)], 6.0),
        ([0, 1, 2], [(0, 3), (1, 3)], 8.0),
    ]
    nothing_yet = rounds(EveryInterval(seconds=0.5), 3, THREE, 2)
    assert nothing_yet == [([0, 1, 2], [], 0.5), ([], [(0, 0)], 1.0)]


def test_arrivals_by_hand():
    one_by_one = rounds(AfterArrivals(count=1), 3, THREE, 6)
    assert one_by_one == [
        ([0, 1, 2], [(0, 0)], 1.0),
        ([0], [(0, 1)], 2.0),  # at 2 s both 0 and 1 arrive, 0 first
        ([0], [(1, 0)], 2.0),
        ([1], [(0, 2)], 3.0),
        ([0], [(0, 4)], 4.0),
        ([0], [(1, 3)], 4.0),
    ]
    pairs = rounds(AfterArrivals(count=2), 3, THREE, 3)
    assert pairs == [
        ([0, 1, 2], [(0, 0), (1, 0)], 2.0),
        ([0, 1], [(0, 1), (1, 1)], 4.0),
        ([0, 1], [(0, 2), (2, 0)], 5.0),  # 0 is not asked again before the aggregation
    ]


def test_concurrency_limits_who_works_at_a_time():
    made = schedule(AfterArrivals(count=4, concurrency=3), 20, ExponentialDelays(mean_s=1.0), seed=3)
    at_work, seen = {}, set()
    for version in range(60):
        planned = made.next_round(version)
        assert len(planned.answers) == 4
        assert len({client for client, _ in planned.answers}) == 4
        at_work |= dict.fromkeys(planned.started, version)
        for client, answered in planned.answers:
            assert at_work.pop(client) == answered
        assert len(at_work) <= 3
        seen |= {client for client, _ in planned.answers}
    assert len(seen) == 20
    other = rounds(AfterArrivals(count=4, concurrency=3), 20, ExponentialDelays(mean_s=1.0), 3, seed=4)
    assert other != rounds(AfterArrivals(count=4, concurrency=3), 20, ExponentialDelays(mean_s=1.0), 3, seed=3)


def test_who_replaces_the_last_one_gets_the_next_version():
    alone = rounds(AfterArrivals(count=1, concurrency=1), 4, ConstantDelays(), 5)
    assert [answers[0][1] for _, answers, _ in alone] == [0, 1, 2, 3, 4]  # never an old one
    pairs = rounds(AfterArrivals(count=2, concurrency=1), 4, ConstantDelays(), 3)
    assert [{version for _, version in answers} for _, answers, _ in pairs] == [{0}, {1}, {2}]


def test_a_round_ends_when_nobody_is_left():
    few = rounds(AfterArrivals(count=4), 5, THREE.__class__(mean_s=1.0), 3, participation=UniformSampling(count=2))
    assert [len(answers) for _, answers, _ in few] == [2, 2, 2]
    sampled = rounds(EveryInterval(seconds=0.25), 4, ConstantDelays(), 6, participation=UniformSampling(count=2))
    working = set()
    for started, answers, _ in sampled:
        assert not working & set(started)  # who is at work is not asked again
        working = (working | set(started)) - {client for client, _ in answers}


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(ConfigError, match="delays must be given for an algorithm that does not wait"):
        schedule(EveryInterval(seconds=1.0), 3, None)
    with pytest.raises(ConfigError, match="than there are clients, 3, got 4; lower buffer_size"):
        schedule(AfterArrivals(count=4), 3, THREE)


@pytest.mark.parametrize(
    "pacing", [Synchronous(), EveryInterval(seconds=0.3), AfterArrivals(count=3), AfterArrivals(count=3, concurrency=4)]
)
def test_resumed_schedule_goes_on(pacing):
    settings = {"delays": ExponentialDelays(mean_s=0.5), "participation": UniformSampling(count=6), "seed": 5}
    whole = rounds(pacing, 10, count=9, **settings)
    first, second = (schedule(pacing, 10, **settings) for _ in range(2))
    for version in range(4):
        first.next_round(version)
    second.load_state_dict(first.state_dict())
    assert second.versions_at_work == first.versions_at_work
    for version in range(4, 9):
        planned = second.next_round(version)
        assert (planned.started, planned.answers, second.time_s) == whole[version]
    with pytest.raises(StateMismatchError, match="delays of the checkpoint must be none, got some"):
        schedule(Synchronous(), 10, None).load_state_dict(first.state_dict())


# -- weights -----------------------------------------------------------------------------------------------------------


def reply(client, version, d=2):
    value = torch.full((d,), float(client + 1), dtype=torch.float64)
    return Reply(client=client, version=version, num_samples=1, num_steps=1, tensors={"delta": value})


class Recorded:
    """An algorithm's server on a schedule: the weight of each client in each aggregation."""

    def __init__(self, algorithm, num_clients, delays, **settings):
        self.schedule = schedule(algorithm.pacing, num_clients, delays, **settings)
        self.server = Server(algorithm, 2)
        self.state = self.server.begin(torch.zeros(2, dtype=torch.float64), num_clients)
        self.weights = []

    def run(self, count):
        """(count, num_clients)."""
        for version in range(self.state.version, self.state.version + count):
            replies = sorted((reply(*answer) for answer in self.schedule.next_round(version).answers), key=id_of)
            self.state.memory.version = version
            given = self.server.algorithm.weights(self.state.memory, replies) if replies else []
            row = np.zeros(self.state.memory.num_clients)
            row[[each.client for each in replies]] = given
            self.weights.append(row)
            self.state, _ = self.server.step(self.state, replies)
        return np.stack(self.weights)


def id_of(each):
    return each.client


def least_common_rounds(interval_s):
    return math.lcm(*(math.ceil(round(time / interval_s, 9)) for time in TIMES))


@pytest.mark.parametrize("interval_s", [0.2, 0.5, 0.8, 1.0])
def test_the_average_weight_of_fedfix_is_exactly_the_importance(interval_s):
    period = least_common_rounds(interval_s)
    weights = Recorded(FedFix(interval_s=interval_s, times_s=TIMES), 10, TEN).run(2 * period)
    for part in (weights[:period], weights[period:]):
        np.testing.assert_allclose(part.mean(0), 0.1, rtol=1e-14)


@pytest.mark.parametrize("interval_s", [0.2, 0.5, 0.8, 1.0])
def test_fedfix_finds_the_same_weights_without_being_told_the_times(interval_s):
    period = least_common_rounds(interval_s)
    job = Recorded(FedFix(interval_s=interval_s), 10, TEN)
    job.run(period)
    rounds_of_each = [math.ceil(round(time / interval_s, 9)) for time in TIMES]
    np.testing.assert_array_equal(job.state.memory.counters["participation"].weights, rounds_of_each)
    np.testing.assert_allclose(job.run(period)[period:].mean(0), 0.1, rtol=1e-14)


def test_without_weights_fedfix_would_be_biased():
    counted = Recorded(FedFix(interval_s=0.2, times_s=0.2), 10, TEN).run(60)  # as if all were fast
    assert counted.mean(0)[0] / counted.mean(0)[-1] == pytest.approx(5.0)


@pytest.mark.parametrize("times_s", [None, TIMES], ids=["estimated", "known"])
def test_the_average_weight_of_asynchronous_fedavg_is_the_importance(times_s):
    job = Recorded(AsyncFedAvg(times_s=times_s), 10, TEN)
    job.run(500)
    weights = job.run(3000)[500:]
    # Estimates and finitely many rounds: within three hundredths.
    np.testing.assert_allclose(weights.mean(0), 0.1, rtol=0.03)


@pytest.mark.parametrize("size", [1, 3])
def test_fedbuff_of_participation_is_unbiased_and_the_paper_s_is_not(size):
    unbiased = Recorded(FedBuff(buffer_size=size, correction="participation"), 10, TEN)
    unbiased.run(300)
    np.testing.assert_allclose(unbiased.run(2000)[300:].mean(0), 0.1, rtol=0.03)
    paper = Recorded(FedBuff(buffer_size=size), 10, TEN).run(500).mean(0)
    assert paper[0] > 2 * paper[-1]
    waits_for_all = Recorded(FedBuff(buffer_size=10), 10, TEN).run(5)
    np.testing.assert_allclose(waits_for_all, 0.1)


def test_fedbuff_by_hand():
    server = Server(FedBuff(buffer_size=4, discount=0.5), 2)
    state = server.begin(torch.zeros(2, dtype=torch.float64), 5)
    for _ in range(3):
        state, _ = server.step(state, [])
    state, _ = server.step(state, [reply(0, 3), reply(1, 0), reply(2, 2)])  # ages 0, 3, 1; three of four
    expected = (1.0 * 1 + 0.5 * 2 + 2**-0.5 * 3) / 4
    np.testing.assert_allclose(state.model.numpy(), expected, rtol=1e-15)


def test_old_replies_are_refused_beyond_max_staleness():
    for algorithm in (FedBuff(buffer_size=1, max_staleness=2), FedAsync(max_staleness=2), FedFix(interval_s=1.0)):
        server = Server(algorithm, 2)
        state = server.begin(torch.zeros(2, dtype=torch.float64), 5)
        for _ in range(4):
            state, _ = server.step(state, [])
        state, _ = server.step(state, [reply(0, 1)])
        late = getattr(algorithm, "max_staleness", None) is not None
        assert state.refused == ({"late": 1} if late else {})
        assert bool(state.model.any()) != late
        state, _ = server.step(state, [reply(0, 3), reply(1, 6)])
        assert state.refused["another version"] == 1


def test_fedasync_by_hand():
    """x <- (1 - a s) x + a s y, where y = the version that the client was sent, plus its delta."""
    algorithm = FedAsync(mixing=0.6, discount=0.5, max_staleness=3)
    server = Server(algorithm, 2)
    x = np.array([1.0, -2.0])
    state = server.begin(torch.from_numpy(x), 5)
    versions = []
    for client, answered in ((0, 0), (1, 0), (2, 1), (None, 0), (0, 2), (1, 4), (3, 3)):
        versions.append(x)
        if client is None:
            state, _ = server.step(state, [])
        else:
            y = versions[answered] + client + 1
            share = 0.6 / math.sqrt(1 + state.version - answered)
            x = (1 - share) * x + share * y
            state, _ = server.step(state, [reply(client, answered)])
        np.testing.assert_allclose(state.model.numpy(), x, rtol=1e-13)
    assert not state.refused


def test_samples_weigh_where_they_should():
    server = Server(FedFix(interval_s=1.0, times_s=(1.0, 2.0, 3.0), weighting="samples"), 2)
    state = server.begin(torch.zeros(2, dtype=torch.float64), 3)
    replies = [
        Reply(client=i, version=0, num_samples=n, num_steps=1, tensors={"delta": torch.ones(2, dtype=torch.float64)})
        for i, n in enumerate((10, 20, 30))
    ]
    assert server.algorithm.weights(state.memory, replies) == pytest.approx([1 / 6, 2 * 2 / 6, 3 * 3 / 6])


def test_versions_at_work_are_those_that_still_come():
    made = schedule(AfterArrivals(count=1), 3, THREE)
    due = {}
    for version in range(12):
        planned = made.next_round(version)
        due |= dict.fromkeys(planned.started, version)
        for client, answered in planned.answers:
            assert due.pop(client) == answered
        assert made.versions_at_work == set(due.values())
    assert all(a <= b for a, b in itertools.pairwise(r[2] for r in rounds(AfterArrivals(count=1), 3, THREE, 12)))


def test_buffers_go_as_far_as_the_replies_weigh():
    """A running variance, which sums of weights other than one would spoil."""
    for algorithm, share in ((FedAsync(mixing=0.25), 0.25), (FedFix(interval_s=1.0, times_s=1.0), 0.2)):
        server = Server(algorithm, 2)
        state = server.begin(torch.ones(3, dtype=torch.float64), 5)
        sent = {"delta": torch.zeros(2, dtype=torch.float64), "rest": torch.tensor([5.0], dtype=torch.float64)}
        one = Reply(client=1, version=0, num_samples=4, num_steps=1, tensors=sent)
        state, _ = server.step(state, [one])
        assert state.model[2].item() == pytest.approx(1.0 + share * 4.0)
    heavy = Server(FedFix(interval_s=0.1, times_s=1.0), 2)
    state, _ = heavy.step(heavy.begin(torch.ones(3, dtype=torch.float64), 5), [one])
    assert state.model[2].item() == 5.0  # a weight of 2: not beyond the reply's own
