"""The HSDP example learns under torchrun, sends less between its replicas, and says so."""

import os
import re
import subprocess
import sys

import pytest

from example_ranks import DEADLINE_S, EXAMPLES

pytestmark = pytest.mark.job


def test_two_replicas_of_two_shards():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, EXAMPLES / "hsdp_dgc.py", "--steps", "120"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"2 replicas of 2 shards: accuracy ([0-9.]+)%, (\d+)x fewer bytes between", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 60
    assert int(found[2]) > 20
