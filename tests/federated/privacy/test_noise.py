"""Noise is Gaussian, repeats only on the same values, and its key is nobody's."""

import pytest
import torch

from distopt.errors import ConfigError
from distopt.federated.privacy.noise import NoiseSource


def noise(source, values, *purpose, std=1.0):
    return source.add(values, std, *purpose).double() - values.double()


def test_it_is_gaussian_with_the_standard_deviation_asked_for():
    found = noise(NoiseSource(0), torch.zeros(200_000, dtype=torch.float64), "x", std=3.0)
    assert abs(float(found.mean())) < 5 * 3.0 / 200_000**0.5
    assert float(found.std()) == pytest.approx(3.0, rel=0.01)
    beyond = float((found.abs() > 2 * 3.0).double().mean())
    assert beyond == pytest.approx(0.0455, abs=0.003)


def test_other_values_get_independent_noise_even_for_the_same_seed_and_purpose():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = values.clone()
    other[-1] += 1e-9
    first, second = noise(NoiseSource(7), values, "diff2", 3), noise(NoiseSource(7), other, "diff2", 3)
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.08


def test_the_same_values_seed_and_purpose_are_the_same_release():
    values = torch.ones(10)
    again = NoiseSource(7).add(values, 2.0, "diff2", 3)
    assert torch.equal(NoiseSource(7).add(values, 2.0, "diff2", 3), again)
    for source, purpose in (
        (NoiseSource(8), ("diff2", 3)),
        (NoiseSource(7), ("diff2", 4)),
        (NoiseSource(7), ("dp", 3)),
    ):
        assert not torch.equal(source.add(values, 2.0, *purpose), again)
    assert torch.equal(values, torch.ones(10))


def test_without_a_seed_no_two_sources_agree_and_the_state_has_no_key():
    values = torch.ones(10)
    first, second = NoiseSource(), NoiseSource()
    given = first.add(values, 1.0, "x", 0)
    assert not torch.equal(given, second.add(values, 1.0, "x", 0))
    assert first.state_dict() == {}
    second.load_state_dict(first.state_dict())
    assert not torch.equal(given, second.add(values, 1.0, "x", 0))


def test_processes_of_one_server_take_the_leader_s_key():
    leader, follower = NoiseSource(), NoiseSource()
    told = []

    def said(fact):
        told.append(told[0] if told else fact())
        return told[0]

    leader.share(said)
    follower.share(said)
    values = torch.ones(3)
    assert torch.equal(leader.add(values, 1.0, "x"), follower.add(values, 1.0, "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_shape_stay(dtype):
    values = torch.zeros((), dtype=dtype)
    assert NoiseSource(0).add(values, 1.0, "x").dtype == dtype
    assert NoiseSource(0).add(torch.zeros(2, 3, dtype=dtype).mT, 1.0, "x").shape == (3, 2)
    assert NoiseSource(0).add(values, 0.0, "x") is values


@pytest.mark.parametrize("seed", [-1, 0.5, "1", True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ConfigError, match="noise_seed must be an integer of at least 0"):
        NoiseSource(seed)
