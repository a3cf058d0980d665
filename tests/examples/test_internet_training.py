"""The example learns under torchrun; without, one may come later and another be killed."""

import os
import random
import re
import subprocess
import sys

import pytest

from example_ranks import AS_IT_IS, DEADLINE_S, EXAMPLES, free_port

pytestmark = pytest.mark.job

EXAMPLE = EXAMPLES / "internet_training.py"
ENDS = re.compile(
    r"rank (\d): held-out loss ([0-9.]+) after \d+ steps and (\d+) exchanges, ([0-9,]+) kB instead of ([0-9,]+), "
    r".*, (\d) ranks"
)


@pytest.fixture
def text(tmp_path):
    """Words in random order: their letters can be learnt, their order cannot."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(draw.choice(("gradient", "compression", "velocity", "sparse")) for _ in range(3000)))
    return path


def test_it_learns_the_same_model_on_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    ran = subprocess.run(
        [*command, "--steps", "30", "--inner-steps", "10", "--warmup-rounds", "0", "--batch-size", "4"],
        env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ends = sorted(ENDS.findall(ran.stdout))
    assert [(rank, exchanges, members) for rank, _, exchanges, _, _, members in ends] == [
        ("0", "3", "2"),
        ("1", "3", "2"),
    ]
    assert ends[0][1] == ends[1][1], "the last step ends with an exchange: one model"
    assert float(ends[0][1]) < 4.0  # guessing: 4.6
    sent, whole = (float(ends[0][place].replace(",", "")) for place in (3, 4))
    assert whole > 150 * sent


def test_one_comes_later_and_another_is_killed(warm_python, text):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = ["--text", text, "--steps", "400", "--inner-steps", "4", "--batch-size", "1", "--warmup-rounds", "0"]
    started = [warm_python.start(AS_IT_IS, EXAMPLE, *arguments, RANK=str(rank), **common) for rank in range(2)]
    try:
        address = started[0].says(r"rank 0 works at (\S+)\n")[1]
        started.append(warm_python.start(AS_IT_IS, EXAMPLE, *arguments, "--join", address))
        started[2].says("rank 2 works at")
        started[1].kill()
        left = [each.communicate(timeout=DEADLINE_S) for each in (started[0], started[2])]
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert [started[0].returncode, started[2].returncode] == [0, 0], "".join(errors for _, errors in left)
    ends = [ENDS.search(output) for output, _ in left]
    assert [(end[1], end[6]) for end in ends] == [("0", "2"), ("2", "2")]
    assert float(ends[0][2]) == pytest.approx(float(ends[1][2]), abs=0.02)
    assert float(ends[0][2]) < 2.0
