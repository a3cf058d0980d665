"""The language model example under real torchrun, on a text that the test writes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_dgc.py"
STEPS = 60


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture
def text(tmp_path):
    """Words in random order: their letters can be learnt, their order cannot."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(draw.choice(("gradient", "compression", "velocity", "sparse")) for _ in range(6000)))
    return path


@pytest.mark.timeout(110)
def test_it_learns_dense_and_with_a_thousandth_of_the_gradient(text, tmp_path):
    figures = {}
    for algorithm in ("dense", "dgc"):
        report = tmp_path / f"{algorithm}.json"
        ran = torchrun(
            "--text", text, "--algorithm", algorithm, "--steps", STEPS, "--hidden", 32, "--batch-size", 4,
            "--density", 0.01, "--json", report,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert f"step {STEPS}: perplexity " in ran.stdout
        figures[algorithm] = json.loads(report.read_text())
    guessing = len(set(text.read_text()))
    assert figures["dense"]["perplexity"] < 0.7 * guessing
    assert figures["dgc"]["perplexity"] < 0.9 * guessing
    assert figures["dense"]["saving"] == pytest.approx(1.0)
    assert figures["dgc"]["saving_after_warmup"] > 15


def test_a_text_that_is_too_short_is_refused_with_the_rule(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    ran = subprocess.run(
        [sys.executable, EXAMPLE, "--text", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0
    assert "10,000 characters or more, got 9" in ran.stderr
