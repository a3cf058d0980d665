"""A run that is saved and goes on ends with the bits of one that never was, and what does not fit is refused."""

import re

import local_rank
import pytest
import torch

from distopt.local import DiLoCo, SparseLoCo

SMALL = {"chunk": 16, "k": 4}
SETTINGS = {  # all are saved after 7 of 15 steps
    "nothing under way": SparseLoCo(inner_steps=4, outer_momentum=0.5, **SMALL),
    "under way": SparseLoCo(inner_steps=6, overlap=3, **SMALL),
    "fragments under way": SparseLoCo(inner_steps=6, fragments=3, overlap=5, **SMALL),
    "a warm-up": DiLoCo(inner_steps=5, overlap=2, warmup_rounds=3),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a warm-up", "float32"),
        ("under way", "scaler"),
        ("fragments under way", "bfloat16"),
        ("nothing under way", "float64"),
        *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in SETTINGS if name != "a warm-up"),
    ],
)
def test_it_goes_on_to_the_bit(ranks, tmp_path, name, kind):
    described = SETTINGS[name].to_dict()
    saved = ranks(2)(local_rank.saved_and_whole, described, kind, str(tmp_path))
    resumed = ranks(2)(local_rank.resumed, described, kind, str(tmp_path))
    unsaved = ranks(2)(local_rank.saved_and_whole, described, kind, None)
    for whole, again, other in zip(saved, resumed, unsaved, strict=True):
        for key in ("model", "theta", "residual"):
            assert torch.equal(whole[key], other[key]), f"saving has changed {key}"
            assert torch.equal(whole[key], again[key]), key
        assert whole["buffers"] == again["buffers"]
        assert whole["step"] == again["step"] == 15
    if "under way" in name and name != "nothing under way":
        assert all(each["under_way"] for each in saved)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("configuration", "must agree in algorithm, got .*load it into the configuration"),
        ("model", "a fragment's state must be of .*load it into the configuration and the model"),
        ("buffers", "must have the buffers and frozen parameters of the state, .* load it into the same model"),
        ("ranks", "must agree in world_size, got 2 then and 1 now; .* with as many ranks"),
        ("place", r"rank 0 must load its own state, got \[7\]; give each rank its own file"),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_has_changed(case, message):
    found, unchanged = local_rank.refused_state(case)
    assert re.search(f"StateMismatchError: .*{message}", found), found
    assert unchanged
