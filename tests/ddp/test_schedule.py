"""Every warm-up is a pure function into (0, 1] that ends at the final density; the stages are the published ones."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.ddp import ExponentialWarmup, ListWarmup, PaperWarmup, Schedule

EXAMPLES = {
    PaperWarmup: [{}, {"stage": 4}, {"stage": 4, "steps_per_epoch": 7}],
    ExponentialWarmup: [{}, {"stages": 1}, {"stages": 5, "stage": 2, "steps_per_epoch": 3}],
    ListWarmup: [{"densities": (0.25, 0.05)}, {"densities": (1.0,), "stage": 10}, {"densities": (1, 0.5, 0.2, 0.1)}],
}
SCHEDULES = [made(**values) for made, all_values in EXAMPLES.items() for values in all_values]
FINALS = [1.0, 0.25, 0.004, 0.001, 1e-9]


def stages_of(schedule, final, count):
    """The density in the first and in the last step of each stage."""
    length = schedule.stage * (schedule.steps_per_epoch or 1)
    ends = [
        (schedule.density_at(i * length, final), schedule.density_at((i + 1) * length - 1, final)) for i in range(count)
    ]
    assert all(first == last for first, last in ends)
    return [first for first, _ in ends]


def test_every_schedule_has_an_example_here():
    assert set(EXAMPLES) == set(Schedule._known.values())


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_in_range_and_over_after_its_stages(schedule, final):
    densities = [schedule.density_at(step, final) for step in range(500)]
    assert all(0 < density <= 1 for density in densities)
    assert densities[-1] == final
    assert schedule.density_at(10**12, final) == final
    over = densities.index(final) if final in densities else 0
    assert len(set(densities[max(over, 250) :])) == 1
    assert densities == [schedule.density_at(step, final) for step in range(500)]  # the same on a rank that resumes


@pytest.mark.parametrize("schedule", [PaperWarmup(), ExponentialWarmup(), ExponentialWarmup(stages=9)], ids=repr)
@given(final=st.floats(1e-6, 1.0))
def test_published_warmups_never_rise_and_never_pass_below_the_final_density(schedule, final):
    densities = stages_of(schedule, final, 12)
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == final


@pytest.mark.parametrize("length", [{}, {"stage": 3}, {"stage": 4, "steps_per_epoch": 7}, {"steps_per_epoch": 100}])
def test_the_stages_of_the_paper(length):
    expected = [0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001]
    assert stages_of(PaperWarmup(**length), 0.001, 6) == expected
    assert stages_of(ListWarmup(densities=(0.25, 0.0625, 0.015625, 0.004), **length), 0.001, 6) == expected


def test_the_paper_stages_stop_at_a_denser_final():
    assert stages_of(PaperWarmup(), 0.05, 5) == [0.25, 0.0625, 0.05, 0.05, 0.05]


@pytest.mark.parametrize("stages", [1, 4, 5])
@pytest.mark.parametrize("final", FINALS)
def test_the_exponential_formula(stages, final):
    expected = [final ** ((e + 1) / (stages + 1)) for e in range(stages)] + [final]
    assert stages_of(ExponentialWarmup(stages=stages), final, stages + 1) == expected


def test_the_exponential_is_geometric():
    densities = stages_of(ExponentialWarmup(stages=4), 0.001, 5)
    ratios = [after / before for before, after in itertools.pairwise(densities)]
    assert all(math.isclose(ratio, ratios[0]) for ratio in ratios)
    assert math.isclose(densities[0], ratios[0])


def test_epochs_are_steps_times_the_length_of_the_loader():
    by_epoch, by_step = PaperWarmup(stage=2, steps_per_epoch=30), PaperWarmup(stage=60)
    assert [by_epoch.density_at(i, 1e-3) for i in range(400)] == [by_step.density_at(i, 1e-3) for i in range(400)]
    assert by_epoch.density_at(59, 1e-3) == 0.25
    assert by_epoch.density_at(60, 1e-3) == 0.0625
    assert by_epoch.density_at(239, 1e-3) == 0.004
    assert by_epoch.density_at(240, 1e-3) == 0.001
