"""The robust rules: against a few lines of numpy, with outliers, with ties, and in any order of arrival."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import ConfigError
from distopt.federated import bulyan, krum, krum_scores, median, multi_krum, trimmed_mean
from distopt.federated.robust import coordinate_wise, distances
from distopt.federated.robust.distances import squared_distances

# For each rule: how many clients it needs to bear f arbitrary ones, and the rule for f.
RULES = {
    "trimmed_mean": (lambda f: 2 * f + 1, trimmed_mean),
    "median": (lambda f: 2 * f + 1, lambda deltas, f, ids=None: median(deltas, ids)),
    "krum": (lambda f: 2 * f + 3, krum),
    "multi_krum": (
        lambda f: 2 * f + 3,
        lambda deltas, f, ids=None: multi_krum(deltas, f, max(len(deltas) - f - 2, 1), ids),
    ),
    "bulyan": (lambda f: 4 * f + 3, bulyan),
}


def numpy_scores(x, f):
    n = len(x)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    return np.array([np.sort(np.delete(squared[i], i))[: n - f - 2].sum() for i in range(n)])


def numpy_multi_krum(x, f, m):
    return x[np.sort(np.argsort(numpy_scores(x, f), kind="stable")[:m])].mean(0)


def numpy_trimmed_mean(x, f):
    return np.sort(x, axis=0)[f : len(x) - f].mean(0)


def numpy_bulyan(x, f):
    left, chosen = list(range(len(x))), []
    while len(chosen) < len(x) - 2 * f:
        squared = ((x[left][:, None] - x[left][None]) ** 2).sum(-1)
        near = max(len(left) - f - 2, 1)
        totals = [np.sort(np.delete(squared[i], i))[:near].sum() for i in range(len(left))]
        chosen.append(left.pop(int(np.argmin(totals))))
    kept = x[sorted(chosen)]
    result = np.empty(x.shape[1])
    for j in range(x.shape[1]):
        near = np.argsort(np.abs(kept[:, j] - np.median(kept[:, j])), kind="stable")
        result[j] = kept[near[: len(kept) - 2 * f], j].mean()
    return result


NUMPY = {
    "trimmed_mean": numpy_trimmed_mean,
    "median": lambda x, f: np.median(x, axis=0),
    "krum": lambda x, f: x[np.argmin(numpy_scores(x, f))],
    "multi_krum": lambda x, f: numpy_multi_krum(x, f, max(len(x) - f - 2, 1)),
    "bulyan": numpy_bulyan,
}


def normal(n, d, seed, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[None, 40], ids=["one block", "blocks of a few values"])
def block(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(coordinate_wise, "_BLOCK_VALUES", request.param)
        monkeypatch.setattr(distances, "_BLOCK_VALUES", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rule_is_its_few_lines_of_numpy(name, dtype):
    needed, rule = RULES[name]

    @settings(max_examples=15, deadline=None)
    @given(f=st.integers(0, 3), more=st.integers(0, 4), d=st.integers(0, 30), seed=st.integers(0, 1000))
    def check(f, more, d, seed):
        deltas = normal(needed(f) + more, d, seed, dtype)
        expected = torch.from_numpy(NUMPY[name](deltas.double().numpy(), f)) if d else torch.empty(0)
        found = rule(deltas, f)
        assert found.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)

    check()


@pytest.mark.parametrize("name", RULES)
def test_order_of_arrival_does_not_show_in_one_bit(name):
    needed, rule = RULES[name]

    @settings(max_examples=25, deadline=None)
    @given(f=st.integers(0, 2), seed=st.integers(0, 1000), random=st.randoms(use_true_random=False))
    def check(f, seed, random):
        n = needed(f) + 2
        # Few different values: many ties, in the scores and in the coordinates.
        deltas = torch.randint(-1, 2, (n, 6), generator=torch.Generator().manual_seed(seed)) * 0.1
        ids = sorted(random.sample(range(100), n))
        arrival = random.sample(range(n), n)
        found = rule([deltas[i] for i in arrival], f, [ids[i] for i in arrival])
        assert torch.equal(found, rule(deltas, f))

    check()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wrong", ["together", "apart", "opposite", "NaN", "Inf"])
def test_arbitrary_clients_cannot_move_it_out_of_the_range_of_the_honest_ones(name, wrong):
    needed, rule = RULES[name]

    @settings(max_examples=10, deadline=None)
    @given(f=st.integers(1, 3), more=st.integers(0, 3), seed=st.integers(0, 1000), random=st.randoms())
    def check(f, more, seed, random):
        honest = normal(needed(f) + more - f, 8, seed)
        attack = torch.full((f, 8), 1e9) if wrong != "apart" else 1e9 * normal(f, 8, seed + 1).sign()
        if wrong == "opposite":
            attack[::2] *= -1
        elif wrong in ("NaN", "Inf"):
            attack[:] = float(wrong)
        deltas = torch.cat([honest, attack])
        arrival = random.sample(range(len(deltas)), len(deltas))
        found = rule(deltas[arrival], f)
        assert (found >= honest.min(0).values).all()
        assert (found <= honest.max(0).values).all()
        if name == "krum":
            assert (found == honest).all(1).any()

    check()


def test_one_coordinate_that_krum_lets_through_is_bounded_by_bulyan():
    """An error as large as the honest deltas' norm, hidden in one of many coordinates of an otherwise perfect delta."""
    honest = normal(6, 10_000, 0)
    attack = honest.mean(0, keepdim=True)
    attack[0, 3] = 50.0
    deltas = torch.cat([attack, honest])
    assert krum(deltas, 1)[3] == 50.0
    assert bulyan(deltas, 1)[3] <= honest[:, 3].max()


def test_ties_go_to_the_lowest_id():
    deltas = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    assert krum_scores(deltas, 0).tolist() == [14.0, 6.0, 6.0, 6.0, 14.0]
    assert krum(deltas, 0).item() == 1.0
    assert krum(deltas, 0, ids=[4, 3, 2, 1, 0]).item() == 3.0
    pairs = torch.tensor([[5.0], [1.0], [1.0], [5.0], [3.0]])
    # With f = 1 the scores add the two nearest: 0 + 4 for all four outer ones, 4 + 4 in the middle.
    assert krum_scores(pairs, 1).tolist() == [4.0, 4.0, 4.0, 4.0, 8.0]
    assert krum(pairs, 1, ids=[4, 3, 2, 1, 0]).item() == 5.0
    assert krum(pairs, 1, ids=[4, 1, 2, 3, 0]).item() == 1.0
    assert multi_krum(pairs, 1, 2, ids=[4, 1, 2, 3, 0]).item() == 1.0
    assert multi_krum(pairs, 1, 2, ids=[0, 2, 3, 1, 4]).item() == 5.0


def test_equally_near_values_go_to_the_lowest_id_in_bulyan_too():
    # With f = 1 all but two are chosen, here the fives; of the median's 0 and the values one away, three are kept.
    deltas = torch.tensor([[-1.0], [-1.0], [0.0], [1.0], [1.0], [5.0], [5.0]])
    assert bulyan(deltas, 1).item() == pytest.approx(-2 / 3)
    assert bulyan(deltas, 1, ids=[5, 6, 4, 0, 1, 2, 3]).item() == pytest.approx(2 / 3)


def test_distances_keep_their_digits_far_from_zero():
    offset, steps = 1e6, torch.tensor([0.0, 1e-6, 3e-6], dtype=torch.float64)
    rows = torch.full((3, 1000), offset, dtype=torch.float64) + steps[:, None]
    exact = 1000 * (rows[:, 0][:, None] - rows[:, 0][None]) ** 2
    found = squared_distances(list(rows))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0.0)
    assert (squared_distances([rows[0], rows[0].clone()]) == 0).all()


def test_a_delta_that_is_not_finite_is_infinitely_far_from_all_others():
    deltas = torch.zeros(5, 3)
    deltas[1, 0], deltas[2, 1], deltas[3, 1] = torch.nan, torch.inf, torch.inf
    found = squared_distances(list(deltas))
    expected = torch.full((5, 5), torch.inf, dtype=torch.float64).fill_diagonal_(0)
    expected[0, 4] = expected[4, 0] = 0
    assert torch.equal(found, expected)
    assert krum_scores(deltas, 0).tolist() == [torch.inf] * 5


def test_float32_deltas_are_compared_in_float64():
    rows = torch.zeros(2, 100_000)
    rows[1] = 2.0**-3
    rows[1, 0] = 2.0**12  # beside its square, those of the others vanish in float32
    assert squared_distances(list(rows))[0, 1].item() == pytest.approx(2.0**24 + 99_999 * 2.0**-6, rel=1e-14)


def test_the_result_is_new_and_needs_no_gradient():
    for _, rule in RULES.values():
        deltas = torch.ones(3, 4, requires_grad=True)
        found = rule(deltas, 0)
        assert not found.requires_grad
        found.zero_()
        assert (deltas == 1).all()


@pytest.mark.parametrize("f", [0, 1, 2])
@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan"])
def test_too_few_clients_are_refused(name, f):
    needed, rule = RULES[name]
    enough = normal(needed(f), 3, 0)
    rule(enough, f)
    with pytest.raises(ConfigError, match=rf"f \+ 3 = {needed(f)} clients, got {needed(f) - 1}; wait for more"):
        rule(enough[1:], f)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: trimmed_mean(torch.ones(4, 2), 2), "below half the number of clients, got 2 for 4"),
        (lambda: trimmed_mean(torch.ones(4, 2), -1), "trim must be an integer"),
        (lambda: trimmed_mean(torch.ones(4, 2), 0.1), "trim must be an integer"),
        (lambda: trimmed_mean([], 0), "got 0 for 0"),
        (lambda: median([]), "at least 1 client"),
        (lambda: median([torch.ones(2), torch.ones(3)]), "one length"),
        (lambda: median(torch.ones(2, 3), [5, 5]), "got 5 twice"),
        (lambda: krum(torch.ones(5, 2), True), "num_byzantine must be an integer"),
        (lambda: krum(torch.ones(5, 2), -1), "num_byzantine must be an integer"),
        (lambda: multi_krum(torch.ones(5, 2), 1, 0), "num_selected must be an integer"),
        (lambda: multi_krum(torch.ones(5, 2), 1, 5), "at most the 4 of 5 clients"),
        (lambda: bulyan(torch.ones(7, 2), 1, [1, 2]), "one id for each row"),
    ],
)
def test_what_does_not_fit_is_refused(call, rule):
    with pytest.raises(ConfigError, match=rule):
        call()
