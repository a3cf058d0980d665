"""Replicas that agree are left alone, one that differs is named, and what cannot be compared is not judged."""

import itertools

import numpy as np
import pytest
import torch
from code_examples import LARGER, SIZES, by_name, examples

from distopt.coding import binary, cyclic, cyclic_mds, disagreement, expander, fingerprint, fractional
from distopt.errors import ConfigError

BY_NAME = by_name(examples(SIZES + LARGER))


def messages_of(code, arrived, seed=0, length=300):
    gradients = np.random.default_rng(seed).standard_normal((code.num_parts, length))
    return (code.matrix @ gradients)[list(arrived)].astype(np.float32)


def fingerprints_of(messages, seed=0):
    return np.stack([fingerprint(torch.from_numpy(message), seed=seed) for message in messages])


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_replicas_that_agree_are_left_alone(name):
    for code in BY_NAME[name]:
        generator = np.random.default_rng(1)
        for count in (0, code.tolerance, code.num_workers // 2):
            arrived = generator.permutation(code.num_workers)[count:]
            assert disagreement(code, arrived, fingerprints_of(messages_of(code, arrived))) is None


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_one_that_differs_is_named_wherever_somebody_can_tell(name, size):
    for code in BY_NAME[name]:
        generator = np.random.default_rng(2)
        arrived = generator.permutation(code.num_workers)
        messages = messages_of(code, arrived)
        checks = code.parity_checks(arrived)
        sizes = np.linalg.norm(messages, axis=1)
        scales = np.sqrt(checks**2 @ sizes**2)
        for i, worker in itertools.islice(enumerate(arrived), 3):
            changed = messages.copy()
            changed[i] += size * sizes[i] * unit(generator, messages.shape[1])
            relative = (np.abs(checks[:, i]) * size * sizes[i] / scales).max(initial=0.0)
            found = disagreement(code, arrived, fingerprints_of(changed))
            if relative < 3e-5:  # nobody holds the same, or its weight is small
                assert found is None
            if relative < 3e-4:
                continue
            assert worker in found.workers
            assert len(found.suspects) == 1
            # Those whose column is parallel cannot be told apart; everybody else is cleared.
            parallel = [
                int(other)
                for j, other in enumerate(arrived)
                if np.linalg.matrix_rank(checks[:, [i, j]], tol=1e-8) == 1 and checks[:, j].any()
            ]
            assert set(found.suspects[0]) >= set(parallel)
            assert relative < 2e-3 or found.suspects[0] == tuple(sorted(parallel))


def unit(generator, length):
    direction = generator.standard_normal(length)
    return (direction / np.linalg.norm(direction)).astype(np.float32)


def test_both_of_a_pair_and_the_odd_one_of_three():
    code = fractional(6, 1)
    prints = np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 1.0], [3.0, 1.1], [0.0, 5.0], [0.0, 5.0]])
    found = disagreement(code, range(6), prints)
    assert found.suspects == ((2, 3),)
    assert 0.01 < found.relative_size < 0.1
    assert "suspected: workers 2, 3" in str(found)
    code = fractional(6, 2)
    prints = np.array([[1.0], [1.0], [1.1], [2.0], [2.0], [2.0]])
    assert disagreement(code, range(6), prints).suspects == ((2,),)
    assert disagreement(code, [5, 2, 0, 4], prints[[5, 2, 0, 4]]).suspects == ((0, 2),)


def test_several_groups_are_judged_apart():
    prints = np.array([[1.0], [1.0], [1.1], [2.0], [2.5], [2.0], [3.0], [3.0], [3.0]])
    found = disagreement(fractional(9, 2), range(9), prints)
    assert found.suspects == ((2,), (4,))
    assert found.workers == (2, 4)


def test_all_are_suspected_where_all_differ():
    prints = np.random.default_rng(0).standard_normal((6, 3))
    assert disagreement(fractional(6, 2), range(6), prints).suspects == ((0, 1, 2), (3, 4, 5))


def test_classes_of_a_binary_code_are_compared_by_their_sums():
    code = binary(5, 1)
    messages = messages_of(code, range(5))
    assert disagreement(code, range(5), fingerprints_of(messages)) is None
    messages[3] *= 1.01
    assert 3 in disagreement(code, range(5), fingerprints_of(messages)).workers
    assert disagreement(code, [0, 1, 3], fingerprints_of(messages)[[0, 1, 3]]) is None  # nothing to compare


@pytest.mark.parametrize("code", [cyclic(8, 3), cyclic_mds(8, 3)], ids=repr)
def test_a_cyclic_code_names_one_worker_from_two_arrivals_too_many_on(code):
    for extra, arrived in ((0, range(3, 8)), (1, range(2, 8)), (2, range(1, 8)), (3, range(8))):
        messages = messages_of(code, arrived)
        messages[2] *= 1.5
        found = disagreement(code, arrived, fingerprints_of(messages))
        if extra == 0:
            assert found is None
        elif extra == 1:
            assert set(found.workers) > {arrived[2]}
        else:
            assert found.workers == (arrived[2],)


def test_what_is_within_tolerance_is_rounding():
    prints = np.array([[1.0], [1.001], [2.0], [2.0]])
    assert disagreement(fractional(4, 1), range(4), prints).suspects == ((0, 1),)
    assert disagreement(fractional(4, 1), range(4), prints, tolerance=0.01) is None


def test_a_gradient_of_zero_is_no_disagreement():
    assert disagreement(fractional(4, 1), range(4), np.zeros((4, 2))) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_fingerprint_that_is_not_finite_is_suspect(value):
    prints = np.ones((4, 2))
    prints[1, 0] = value
    assert disagreement(fractional(4, 1), [3, 2, 1, 0], prints).workers == (2,)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_no_disagreement(value):
    """A part that is not finite makes the messages of all who hold it so; the others are compared as ever."""
    prints = np.ones((4, 2))
    prints[:2] = value
    assert disagreement(fractional(4, 1), range(4), prints) is None
    assert disagreement(fractional(4, 1), range(4), np.full((4, 2), value)) is None
    assert disagreement(fractional(4, 1), [0, 2], prints[[0, 2]]) is None  # the other member has not answered
    prints[3] = 2.0
    assert disagreement(fractional(4, 1), range(4), prints).workers == (2, 3)


@pytest.mark.parametrize("prints", [np.ones(4), np.ones((3, 2)), np.ones((4, 0))])
def test_fingerprints_have_a_row_for_each_arrival(prints):
    with pytest.raises(ConfigError, match="fingerprints must be 4 x projections"):
        disagreement(fractional(4, 1), range(4), prints)


def test_tolerance_is_checked():
    with pytest.raises(ConfigError, match="tolerance must be"):
        disagreement(fractional(4, 1), range(4), np.ones((4, 1)), tolerance=0.0)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 4096 * 64 * 2 + 4096 * 3 + 5])
def test_a_fingerprint_is_linear_and_sees_every_element(length):
    a, b = (torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    expected = 2 * fingerprint(a) - 3 * fingerprint(b)
    assert fingerprint(2 * a - 3 * b) == pytest.approx(expected, abs=1e-8)
    for place in {0, length // 2, length - 1} if length else ():
        one = torch.zeros(length)
        one[place] = 1.0
        assert np.abs(fingerprint(one)).tolist() == [1.0] * 4


def test_fingerprints_differ_by_seed_and_keep_the_size():
    message = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    many = fingerprint(message, num_projections=200, seed=1)
    assert np.sqrt((many**2).mean()) == pytest.approx(message.norm().item(), rel=0.2)
    assert not np.array_equal(fingerprint(message, seed=1), fingerprint(message, seed=2))
    assert np.array_equal(fingerprint(message, seed=1), fingerprint(message, seed=1))
    rounded = message.bfloat16()
    assert fingerprint(rounded, seed=1) == pytest.approx(fingerprint(rounded.float(), seed=1), abs=1e-3)


@pytest.mark.parametrize("message", [torch.zeros(2, 2), torch.zeros(3, dtype=torch.int32)])
def test_a_message_is_flat(message):
    with pytest.raises(ConfigError, match="message must be flat"):
        fingerprint(message)


def test_many_workers_are_judged_quickly_enough_to_ask_each_round():
    for code in (fractional(256, 15), binary(256, 27), cyclic(256, 27), expander(64, 3)):
        arrived = range(5, code.num_workers)
        assert disagreement(code, arrived, fingerprints_of(messages_of(code, arrived, length=50))) is None
