"""Real DeepSpeed on two ranks: with nothing left out it trains as without us, and the ranks always agree."""

import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

import deepspeed_cases as cases

from rank_pool import RankPool

pytestmark = pytest.mark.job

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "launch" / "deepspeed").glob("*.json"))
WHOLE = {"algorithm": "dgc", "density": 1.0}
SPARSE = {"algorithm": "dgc", "density": 0.01, "exchange": "allgather"}


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 1e-3},
    "accumulation": {"gradient_accumulation_steps": 2, "momentum": 0.9, "gradient_clipping": 0.0},
    "clipping": {"gradient_clipping": 0.1, "momentum": 0.9},
    "bf16": {"bf16": {"enabled": True}, "momentum": 0.9, "weight_decay": 1e-3, "gradient_clipping": 0.1},
    "adam": {"kind": "AdamW", "gradient_clipping": 0.1, "lr": 1e-3, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_density_one_is_plain_deepspeed_to_the_bit(pool, name):
    config = cases.ds_config(**CASES[name])
    block = {**WHOLE, "algorithm": "topk" if name == "adam" else "dgc"}
    plain = pool(cases.run, config)
    for overlap in (False, True):
        got = pool(cases.run, {**config, "distopt": {**block, "overlap": overlap}})
        for rank in range(2):
            assert cases.same([plain[rank][0]], [got[rank][0]]), f"overlap={overlap}"
            assert got[rank][1]["steps"] == 6


ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
CASES_OF_ZERO_1 = {
    "sgd": {"momentum": 0.9, "weight_decay": 1e-3, "gradient_accumulation_steps": 2, "gradient_clipping": 0.1},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}, "kind": "AdamW", "lr": 1e-3},
}


@pytest.mark.parametrize("name", CASES_OF_ZERO_1)
def test_density_one_is_plain_zero_1_to_the_bit(pool, name):
    config = cases.ds_config(**ZERO_1, **CASES_OF_ZERO_1[name])
    plain = pool(cases.run, config)
    got = pool(cases.run, {**config, "distopt": {"algorithm": "topk", "density": 1.0}})
    for rank in range(2):
        assert cases.same([plain[rank][0]], [got[rank][0]])
        assert got[rank][1]["steps"] == 6


def test_ranks_stay_identical_at_density_001_with_zero_1(pool):
    config = cases.ds_config(**ZERO_1, **CASES_OF_ZERO_1["sgd"])
    block = {**SPARSE, "algorithm": "topk"}
    (first, stats), (second, _) = pool(cases.run, {**config, "distopt": block}, steps=8)
    assert cases.same([first], [second])
    assert not cases.same([first], [pool(cases.run, config, steps=8)[0][0]])
    assert stats["bytes_sent"] < stats["bytes_dense"] / 8


@pytest.mark.parametrize("more", [{}, {"overlap": True}, ZERO_1], ids=["seam", "overlap", "zero"])
def test_deepspeed_reduces_no_gradients_itself(pool, more):
    block = {"algorithm": "topk", "density": 0.5}
    zero = more if more is ZERO_1 else {}
    config = cases.ds_config(**zero, distopt=block if zero else {**block, **more})
    assert pool(cases.without_deepspeeds_reduction, config) == [2, 2]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_ranks_stay_identical_at_density_001(pool, overlap, bf16):
    config = cases.ds_config(momentum=0.9, weight_decay=1e-3, bf16={"enabled": bf16}, gradient_accumulation_steps=2)
    (first, stats), (second, _) = pool(cases.run, {**config, "distopt": {**SPARSE, "overlap": overlap}}, steps=8)
    plain = pool(cases.run, config, steps=8)[0][0]
    assert cases.same([first], [second])
    assert not cases.same([first], [plain])
    assert stats["bytes_sent"] < stats["bytes_dense"] / 8  # the biases and headers of a small model are most of it
    assert stats["steps"] == 8


def test_momentum_and_decay_are_taken_over_once_and_given_back(pool):
    for outcome in pool(cases.taken_over, SPARSE):
        assert outcome["while"] == [(0.0, 0.0)]
        assert outcome["after"] == [(0.9, 1e-3)]
        assert outcome["buffers"] == 4
        assert outcome["untouched"]
        assert "momentum 0.9 and weight decay 0.001" in outcome["stats"]["taken_over"]
        assert any("gradient_clipping=1 clips the update" in warning for warning in outcome["warnings"]) == (
            outcome["rank"] == 0
        )


def test_after_detach_the_engine_trains_as_plain_deepspeed(pool):
    for same, left in pool(cases.trains_on_after_detach):
        assert same
        assert left == []


def test_a_compiled_engine_trains_as_one_that_is_not(pool):
    assert pool(cases.compiled) == [True, True]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_second_backward_pass_at_the_boundary_is_refused(pool, overlap):
    for message in pool(cases.backward_twice, overlap):
        assert "second one at the boundary" in message


@pytest.mark.parametrize("bf16", [False, True])
def test_a_gradient_that_is_not_finite_is_named_or_left_out(pool, bf16):
    for message, unmoved in pool(cases.not_finite, "error", bf16):
        assert "NonFiniteGradientError" in message
        assert "rank 1" in message
        assert unmoved
    assert pool(cases.not_finite, "skip", bf16) == [("", True)] * 2


def test_a_lost_rank_is_named_before_deepspeed_waits_for_it(pool):
    assert pool(cases.lost_before_clipping) == ["PeerLostError: lost rank 1"] * 2


def test_what_is_found_on_an_engine_is_refused_at_attach(pool):
    for messages in pool(cases.refused_at_attach):
        assert "zero_optimization.stage, got 2" in messages["zero"]
        assert "where each rank has a part of it" in messages["momentum of zero 1"]
        assert "attach once" in messages["twice"]
        assert "DistributedDataParallel" in messages["wrapped"]
        assert "sparse=True" in messages["sparse"]
        assert "got overlap=False" in messages["overlap"]


def test_a_reduction_past_the_seam_of_zero_1_is_refused(pool):
    for message in pool(cases.coalesced):
        assert "use gradient_accumulation_steps" in message


@pytest.mark.parametrize("method", ["log", "save"])
def test_a_rank_that_cannot_write_keeps_no_other_waiting(pool, method, tmp_path):
    (tmp_path / "file").touch()
    told = pool(cases.on_one_rank_only, method, str(tmp_path / "folder"), str(tmp_path / "file"))
    assert f"rank 1 cannot {'write the log' if method == 'log' else 'save'}" in told[0][0]
    assert "file" in told[1][0]
    assert [left for _, left in told] == [[], []]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("density", {}, {"density": 0.5}),
        ("overlap", {}, {"overlap": True}),
        ("bucket_cap_mb", {}, {"bucket_cap_mb": 1}),
        ("checkpoint", {}, {"checkpoint": {"every": 3}}),
    ],
)
def test_ranks_with_different_blocks_are_told(pool, key, first, second):
    for message in pool(cases.different_blocks, first, second):
        assert message.startswith("DesyncError: every rank must attach with the same")
        assert key in message


def test_what_a_run_that_goes_back_has_saved_is_kept(pool, tmp_path):
    assert pool(cases.goes_back, str(tmp_path)) == [3, 3]


def test_the_log_and_every_nth_checkpoint_are_written(pool, tmp_path):
    block = {**SPARSE, "log": {"folder": str(tmp_path / "log"), "every": 2}}
    block["checkpoint"] = {"folder": str(tmp_path / "saved"), "every": 2, "keep": 2}
    pool(cases.run, cases.ds_config(momentum=0.9, gradient_accumulation_steps=2, distopt=block), steps=7)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["global_step4", "global_step6", "latest"]
    assert len(list((tmp_path / "saved" / "global_step6" / "distopt").glob("*.pt"))) == 2
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        "report.txt",
        "stats-0.jsonl",
        "stats-1.jsonl",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ds_config_of_ours_trains(pool, path, tmp_path):
    config = json.loads(path.read_text())
    config["distopt"].pop("log", None)  # its folder is for the example
    (first, stats), (second, _) = pool(cases.run, config, steps=4)
    assert stats["steps"] == 4
    assert cases.same([first], [second])


def test_the_change_that_the_page_shows_trains(pool, tmp_path):
    page = (ROOT / "docs" / "deepspeed.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```diff\n")[1:3]]
    script, config = ("\n".join(line[2:] for line in block.splitlines() if line[:1] != "-") for block in blocks)
    assert pool(cases.as_the_page_shows, script, config, str(tmp_path)) == ["topk", "topk"]


def test_a_ds_config_in_a_file_with_a_job_in_a_file(pool, tmp_path):
    for stats in pool(cases.from_files, str(tmp_path)):
        assert stats["algorithm"] == "topk"
        assert stats["steps"] == 2


def test_a_run_that_is_resumed_goes_on_to_the_bit(pool, tmp_path):
    for overlap in (False, True):
        folder = str(tmp_path / str(overlap))
        assert pool(cases.resumed, {**SPARSE, "overlap": overlap}, folder) == [True, True]
    block = {**SPARSE, "algorithm": "topk"}
    assert pool(cases.resumed, block, str(tmp_path / "zero"), **ZERO_1) == [True, True]


def test_a_plain_checkpoint_is_taken_up_with_its_momentum(pool, tmp_path):
    for rank, (same, warnings) in enumerate(pool(cases.from_plain_checkpoint, WHOLE, str(tmp_path))):
        assert same
        assert sum("no state of distopt" in warning for warning in warnings) == (rank == 0)


def test_plain_deepspeed_takes_up_a_checkpoint_of_ours_with_momentum_in_its_settings(pool, tmp_path):
    assert pool(cases.plain_takes_up, SPARSE, str(tmp_path)) == [(0.9, 1e-3)] * 2


def test_a_checkpoint_of_two_ranks_goes_on_with_three(pool, tmp_path):
    held = pool(cases.saved_with_held_back, SPARSE, str(tmp_path))
    three = RankPool(3)
    try:
        outcomes = three(cases.held_back_after_load, SPARSE, str(tmp_path))
    finally:
        three.close()
    assert sum(outcome["held"] for outcome in outcomes) == pytest.approx(sum(held), abs=1e-5)
    assert cases.same([outcomes[0]["weights"]], [outcomes[1]["weights"]])
    assert cases.same([outcomes[0]["weights"]], [outcomes[2]["weights"]])
