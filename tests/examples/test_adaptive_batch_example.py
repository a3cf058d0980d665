"""The example of growing batches trains in fewer rounds than with a fixed batch, dense and beside DGC."""

import os
import re
import subprocess
import sys

import pytest

from example_ranks import DEADLINE_S, EXAMPLES, run_ranks

pytestmark = pytest.mark.job

EXAMPLE = EXAMPLES / "adaptive_batch.py"
EPOCHS = 3  # of 90 steps of 16 images, at the size that they begin with


def ends(output, epochs=EPOCHS):
    """Accuracy in percent, rounds and batch after the last epoch."""
    found = re.findall(r"epoch \d+: accuracy ([0-9.]+)%, (\d+) rounds, (\d+) images a step, noise scale \d+", output)
    assert len(found) == epochs, output
    accuracy, rounds, batch = found[-1]
    return float(accuracy), int(rounds), int(batch)


def test_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    ran = subprocess.run(
        [*command, "--epochs", str(EPOCHS)],
        env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    accuracy, rounds, batch = ends(ran.stdout)
    assert accuracy > 85
    assert batch > 16
    assert rounds < 90 * EPOCHS


def test_beside_dgc(warm_python):
    options = ["--density", "0.05", "--test", "augmented", "--epochs", EPOCHS]
    accuracy, rounds, batch = ends(run_ranks(warm_python, EXAMPLE, *options))
    assert accuracy > 75
    assert batch > 16
    assert rounds < 90 * EPOCHS


def test_fixed(warm_python):
    accuracy, rounds, batch = ends(run_ranks(warm_python, EXAMPLE, "--fixed", "--epochs", 1), epochs=1)
    assert accuracy > 50
    assert (rounds, batch) == (90, 16)
