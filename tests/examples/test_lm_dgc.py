"""The language model example on a text that the test writes, once under real torchrun."""

import functools
import json
import os
import random
import subprocess
import sys

import pytest

from example_ranks import AS_IT_IS, EXAMPLES, run_ranks

EXAMPLE = EXAMPLES / "lm_dgc.py"
STEPS = 60


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture
def text(tmp_path):
    """Words in random order: their letters can be learnt, their order cannot."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(draw.choice(("gradient", "compression", "velocity", "sparse")) for _ in range(6000)))
    return path


@pytest.mark.job
def test_it_learns_dense_and_with_a_thousandth_of_the_gradient(warm_python, text, tmp_path):
    starters = {"dense": functools.partial(run_ranks, warm_python, EXAMPLE), "dgc": torchrun}
    figures = {}
    for algorithm, start in starters.items():
        report = tmp_path / f"{algorithm}.json"
        output = start(
            "--text", text, "--algorithm", algorithm, "--steps", STEPS, "--hidden", 32, "--batch-size", 4,
            "--density", 0.01, "--json", report,
        )  # fmt: skip
        assert f"step {STEPS}: perplexity " in output
        figures[algorithm] = json.loads(report.read_text())
    guessing = len(set(text.read_text()))
    assert figures["dense"]["perplexity"] < 0.7 * guessing
    assert figures["dgc"]["perplexity"] < 0.9 * guessing
    assert figures["dense"]["saving"] == pytest.approx(1.0)
    assert figures["dgc"]["saving_after_warmup"] > 15


def test_a_text_that_is_too_short_is_refused_with_the_rule(warm_python, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    ran = warm_python.run(AS_IT_IS, EXAMPLE, "--text", path)
    assert ran.returncode != 0
    assert "10,000 characters or more, got 9" in ran.stderr
