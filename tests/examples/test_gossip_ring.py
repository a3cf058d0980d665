"""The example trains under torchrun and without, and goes on from a checkpoint to the same bits."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from example_ranks import DEADLINE_S, EXAMPLES, run_ranks
from tensorboard_events import scalars

pytestmark = pytest.mark.job

EXAMPLE = EXAMPLES / "gossip_ring.py"
ARGUMENTS = ["--data", "digits", "--look-every", "30", "--lr", "0.03"]


def ends(output):
    """(rank, accuracy, exchanges, model) of what each rank says at its end; two may share a line."""
    found = re.findall(
        r"rank (\d): test accuracy ([0-9.]+)% after \d+ steps, (\d+) exchanges, .*?model (\w{16})", output
    )
    return sorted((int(rank), float(accuracy), int(exchanges), model) for rank, accuracy, exchanges, model in found)


def test_torchrun_writes_what_tensorboard_reads(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", EXAMPLE]
    arguments = [
        *ARGUMENTS,
        "--steps",
        "90",
        "--every",
        "2",
        "--topology",
        "one-peer-exponential",
        "--logdir",
        tmp_path,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    ran = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = ends(ran.stdout)
    assert [(rank, exchanges) for rank, _, exchanges, _ in said] == [(rank, 45) for rank in range(3)]
    assert all(accuracy > 80 for _, accuracy, _, _ in said)
    distances = re.findall(r"step (\d+): accuracy [0-9.]+%, consensus distance ([0-9.e-]+)\n", ran.stdout)
    assert [step for step, _ in distances] == ["30", "60", "90"]
    for rank in range(3):
        read = scalars(tmp_path / f"rank-{rank}")
        written = read["consensus_distance"]
        assert [each.value for each in written] == [pytest.approx(float(said), rel=0.01) for _, said in distances]
        assert {"variance_ratio", "accuracy", "loss", "bytes_sent"} <= set(read)


def test_a_checkpoint_goes_on_to_the_same_bits(warm_python, tmp_path):
    arguments = [*ARGUMENTS, "--mixing", "noloco", "--topology", "random-matchings", "--every", "4", "--seed", "1"]
    arguments += ["--steps", "60", "--checkpoints", str(tmp_path)]
    (whole,) = ends(run_ranks(warm_python, EXAMPLE, *arguments))
    shutil.rmtree(tmp_path / "step-60")
    output = run_ranks(warm_python, EXAMPLE, *arguments)
    assert "step 30:" not in output, "it must go on, not begin again"
    (resumed,) = ends(output)
    assert (resumed[1], resumed[3]) == (whole[1], whole[3])
