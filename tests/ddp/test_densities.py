"""Which parameters are sent whole, and which have a density of their own."""

import pytest
import torch

from distopt.ddp.densities import choose_densities
from distopt.errors import CompatibilityError

LARGEST = 2**31 - 1


def shape(*sizes):
    return torch.empty(sizes, device="meta")


MODEL = {
    "embed.weight": shape(100, 8),
    "body.0.weight": shape(8, 8),
    "body.0.bias": shape(8),
    "body.1.weight": shape(4, 8, 3, 3),
    "temperature": shape(),
    "head.weight": shape(10, 8),
    "head.bias": shape(10),
}
ALWAYS_WHOLE = {"body.0.bias", "temperature", "head.bias"}


def test_tensors_of_at_most_one_dimension_are_sent_whole():
    chosen = choose_densities(MODEL, 0.01, (), {})
    assert list(chosen) == list(MODEL)
    assert {name for name, density in chosen.items() if density is None} == ALWAYS_WHOLE
    assert {density for density in chosen.values() if density is not None} == {0.01}


def test_density_one_sends_everything_whole():
    assert set(choose_densities(MODEL, 1.0, (), {}).values()) == {None}
    assert set(choose_densities(MODEL, 1, (), {}).values()) == {None}
    chosen = choose_densities(MODEL, 0.01, (), {"head.*": 1})
    assert chosen["head.weight"] is None
    assert chosen["embed.weight"] == 0.01


def test_skip_is_by_shell_pattern_and_beats_a_density():
    chosen = choose_densities(MODEL, 0.01, ("embed.*", "body.?.weight"), {"embed.weight": 0.5})
    assert [name for name, density in chosen.items() if density is not None] == ["head.weight"]


def test_the_first_pattern_that_matches_counts():
    assert choose_densities(MODEL, 0.01, (), {"body.*": 0.5, "*": 0.2})["body.0.weight"] == 0.5
    assert choose_densities(MODEL, 0.01, (), {"*": 0.2, "body.*": 0.5})["body.0.weight"] == 0.2
    assert choose_densities(MODEL, 0.01, (), {"body.1.*": 0.5})["body.0.weight"] == 0.01


@pytest.mark.parametrize(
    ("skip", "overrides", "pattern"),
    [(("encoder.*",), {}, "encoder.*"), ((), {"Head.*": 0.1}, "Head.*"), (("",), {}, ""), (("head",), {}, "head")],
)
def test_a_pattern_that_matches_nothing_is_an_error(skip, overrides, pattern):
    with pytest.raises(CompatibilityError) as caught:
        choose_densities(MODEL, 0.01, skip, overrides)
    message = str(caught.value)
    assert f"the pattern {pattern!r} must match a parameter, got none among embed.weight, body.0.weight" in message
    assert "... (7 in all)" in message
    assert "see dict(model.named_parameters()) for the names" in message


def test_a_density_for_nothing_but_whole_tensors_is_an_error():
    with pytest.raises(CompatibilityError) as caught:
        choose_densities(MODEL, 0.01, (), {"*.bias": 0.1})
    message = str(caught.value)
    assert "the pattern '*.bias' with density 0.1 must match a tensor of two or more dimensions" in message
    assert "got only body.0.bias, head.bias" in message
    assert "leave it out" in message
    assert choose_densities(MODEL, 0.01, (), {"*.bias": 1.0})["head.bias"] is None


def test_a_tensor_too_large_for_int32_positions():
    huge = {"embed.weight": shape(2, 2**30)}
    with pytest.raises(CompatibilityError) as caught:
        choose_densities(huge, 0.01, (), {})
    message = str(caught.value)
    assert f"at most {LARGEST} entries, 'embed.weight' has {2**31}" in message
    assert "add it to skip=('embed.weight',) or split it" in message
    assert choose_densities(huge, 0.01, ("embed.weight",), {}) == {"embed.weight": None}
    assert choose_densities({"just.fits": shape(1, LARGEST)}, 0.01, (), {}) == {"just.fits": 0.01}
