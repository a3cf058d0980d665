"""FedAU's weights: the sequences of the algorithm, a plain loop over clients as the oracle, and the cutoff's bias."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import ParticipationWeights

CUTOFFS = st.one_of(st.integers(1, 6), st.just(math.inf))


def plain_loop(rounds, cutoff):
    """The weights that each of the rounds uses and those after the last, client by client, as the paper writes it."""
    num_clients = len(rounds[0])
    intervals, waited, weight = [0] * num_clients, [0] * num_clients, [1.0] * num_clients
    used = []
    for participated in rounds:
        used.append(list(weight))
        for n in range(num_clients):
            waited[n] += 1
            if participated[n] or waited[n] == cutoff:
                if intervals[n] == 0:
                    weight[n] = float(waited[n])
                else:
                    weight[n] = (intervals[n] * weight[n] + waited[n]) / (intervals[n] + 1)
                intervals[n] += 1
                waited[n] = 0
    return [*used, weight]


def weights_over(rounds, cutoff):
    counted = ParticipationWeights(len(rounds[0]), cutoff)
    used = [counted.weights]
    for participated in rounds:
        counted.update(torch.tensor(participated, dtype=torch.bool))
        used.append(counted.weights)
    return [weights.tolist() for weights in used]


@pytest.mark.parametrize(
    ("cutoff", "used"),
    [(math.inf, [1, 1, 1, 3, 2, 2, 2, 2, 2, 2, 2]), (3, [1, 1, 1, 3, 2, 2, 2, 2, 2, 2.25, 2.25])],
)
def test_weights_used_in_each_round_of_a_known_sequence(cutoff, used):
    rounds = [[bool(bit)] for bit in [0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1]]
    assert weights_over(rounds, cutoff)[:-1] == [[weight] for weight in used]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), cutoff=CUTOFFS, num_clients=st.integers(1, 6), num_rounds=st.integers(1, 40))
def test_vectorised_counting_is_the_plain_loop_to_the_bit(data, cutoff, num_clients, num_rounds):
    row = st.lists(st.booleans(), min_size=num_clients, max_size=num_clients)
    rounds = data.draw(st.lists(row, min_size=num_rounds, max_size=num_rounds))
    assert weights_over(rounds, cutoff) == plain_loop(rounds, cutoff)


@pytest.mark.parametrize(("p", "cutoff"), [(0.1, 5), (0.02, 50), (0.5, 2), (0.3, 1)])
def test_the_mean_weight_tends_to_the_cutoff_s_bound(p, cutoff):
    num_clients, num_rounds = 5_000, 800
    counted = ParticipationWeights(num_clients, cutoff)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_rounds):
        counted.update(torch.rand(num_clients, generator=generator) < p)
    lengths = np.minimum(np.random.default_rng(0).geometric(p, 100_000), cutoff)
    limit = (1 - (1 - p) ** cutoff) / p
    # Five standard deviations of the mean, and what intervals that the last round cut short leave out.
    deviation = lengths.std() / math.sqrt(num_clients * num_rounds / limit)
    assert abs(counted.weights.mean() - limit) < 5 * deviation + 2 * lengths.var() / num_rounds + 1e-12


def test_known_rates_are_estimated_without_a_cutoff():
    rates = torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64).repeat_interleave(1000)
    counted = ParticipationWeights(4000, math.inf)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        counted.update(torch.rand(4000, generator=generator, dtype=torch.float64) < rates)
    found = counted.weights.reshape(4, 1000).mean(1)
    assert (found * torch.tensor([0.05, 0.2, 0.5, 1.0]) - 1).abs().max() < 0.02


def test_the_sum_over_participants_is_unbiased_where_clients_come_regularly():
    """Client n comes every n+1 rounds: from its second participation on, what it adds per round is 1 on average."""
    periods = torch.arange(1, 7)
    counted = ParticipationWeights(6, math.inf)
    added = torch.zeros(6, dtype=torch.float64)
    for round in range(1, 181):
        participated = round % periods == 0
        if round > 60:
            added += counted.weights * participated
        counted.update(participated)
    assert torch.equal(added / 120, torch.ones(6, dtype=torch.float64))


def test_ids_and_masks_count_the_same():
    by_mask, by_ids, generator = ParticipationWeights(20, 4), ParticipationWeights(20, 4), torch.Generator()
    generator.manual_seed(2)
    for round in range(30):
        participated = torch.rand(20, generator=generator) < 0.3
        ids = participated.nonzero().squeeze(1).flip(0)
        by_mask.update(participated)
        by_ids.update_ids(ids if round % 2 else ids.tolist())
    by_mask.update(torch.zeros(20, dtype=torch.bool))
    by_ids.update_ids([])
    assert torch.equal(by_mask.weights, by_ids.weights)


def test_late_joiners_start_like_the_first_ones():
    counted, alone = ParticipationWeights(2, 3), ParticipationWeights(1, 3)
    for round in range(5):
        counted.update_ids([0] if round % 2 else [])
    before = counted.weights.clone()
    counted.add_clients(1)
    assert counted.num_clients == 3
    assert counted.weights.tolist() == [*before.tolist(), 1.0]
    for round in range(9):
        here = round in (1, 2, 8)
        counted.update_ids([2] if here else [])
        alone.update_ids([0] if here else [])
        assert counted.weights[2] == alone.weights[0]


def test_weights_handed_out_do_not_change_later():
    counted = ParticipationWeights(3)
    handed_out = counted.weights
    counted.update_ids([])
    counted.update_ids([1])
    assert handed_out.tolist() == [1.0, 1.0, 1.0]
    assert counted.weights.tolist() == [1.0, 2.0, 1.0]


def test_the_state_continues_exactly_and_is_24_bytes_per_client():
    counted, generator = ParticipationWeights(50, 4), torch.Generator().manual_seed(3)
    steps = [torch.rand(50, generator=generator) < 0.2 for _ in range(20)]
    for step in steps[:10]:
        counted.update(step)
    state = counted.state_dict()
    assert sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)) == 24 * 50
    resumed = ParticipationWeights(40, 4)  # the last ten joined later
    resumed.load_state_dict(state)
    for step in steps[10:]:
        counted.update(step)
        resumed.update(step)
    assert torch.equal(counted.weights, resumed.weights)
    assert state["waited"].max() < 4  # a copy: the updates after it did not reach it
    again = ParticipationWeights(50, 4)
    again.load_state_dict(state)
    for step in steps[10:]:
        again.update(step)
    assert torch.equal(again.weights, counted.weights)


@pytest.mark.parametrize("cutoff", [0, -1, 2.5, 2.0, True, math.nan, -math.inf, "50", None])
def test_a_cutoff_that_is_no_number_of_rounds_is_refused(cutoff):
    with pytest.raises(ConfigError, match=r"cutoff must be an integer of at least 1 or math.inf, got .*; use 50"):
        ParticipationWeights(3, cutoff)


@pytest.mark.parametrize("num_clients", [-1, 2.0, True, None])
def test_a_number_of_clients_that_is_none_is_refused(num_clients):
    with pytest.raises(ConfigError, match="num_clients must be"):
        ParticipationWeights(num_clients)
    with pytest.raises(ConfigError, match="m must be"):
        ParticipationWeights(1).add_clients(num_clients)


@pytest.mark.parametrize(
    "participated",
    [torch.ones(2, dtype=torch.bool), torch.ones(3), torch.ones(3, 1, dtype=torch.bool), torch.ones(3).long()],
)
def test_a_mask_that_does_not_fit_is_refused_and_counts_nothing(participated):
    counted = ParticipationWeights(3)
    with pytest.raises(ConfigError, match=r"bool tensor of shape \(3,\)"):
        counted.update(participated)
    assert counted.state_dict()["waited"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "rule"),
    [([3], r"in \[0, 3\)"), ([-1], r"in \[0, 3\)"), ([1, 1], "must not repeat"), ([0.5], "integers"), ([True], "bool")],
)
def test_ids_that_do_not_fit_are_refused_and_count_nothing(ids, rule):
    counted = ParticipationWeights(3)
    with pytest.raises(ConfigError, match=rule):
        counted.update_ids(ids)
    assert counted.state_dict()["waited"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"cutoff": 5}, "of cutoff 4"),
        ({"weights": torch.ones(2, dtype=torch.float64)}, "at least 3 clients"),
        ({"waited": torch.zeros(4, dtype=torch.int64)}, "damaged"),
        ({"num_intervals": torch.zeros(3)}, "damaged"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, rule):
    counted = ParticipationWeights(3, 4)
    counted.update_ids([1])
    state = counted.state_dict() | change
    with pytest.raises(StateMismatchError, match=rule):
        counted.load_state_dict(state)
    assert counted.weights.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(StateMismatchError, match="must have the key"):
        counted.load_state_dict({})
