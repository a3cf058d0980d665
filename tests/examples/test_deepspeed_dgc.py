"""The example under DeepSpeed's launcher, and resumed under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from example_ranks import free_port

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.job

ROOT = Path(__file__).parents[2]
SCRIPT = [str(ROOT / "examples" / "deepspeed_dgc.py"), "--deepspeed_config", str(ROOT / "launch/deepspeed/dgc.json")]


def run(starter, *arguments):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RANKS": "2",
        "PORT": free_port(),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / starter), *SCRIPT, *arguments],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [(int(epoch), float(part)) for epoch, part in re.findall(r"epoch (\d+): accuracy ([\d.]+)%", done.stdout)]


@pytest.mark.timeout(600)
def test_deepspeeds_launcher_starts_it_and_torchrun_goes_on(tmp_path):
    began = run("deepspeed.sh", "--epochs", "2", "--checkpoints", str(tmp_path))
    assert [epoch for epoch, _ in began] == [1, 2]
    saved = [len(list(folder.glob("*.pt"))) for folder in tmp_path.glob("global_step*/distopt")]
    assert saved == [2, 2]  # of each epoch, one file for each rank
    went_on = run("torchrun_local.sh", "--epochs", "4", "--checkpoints", str(tmp_path))
    assert [epoch for epoch, _ in went_on] == [3, 4]
    assert went_on[-1][1] > 80.0  # of ten digits; a model that begins anew has half of them after its first epoch


def test_the_starter_prints_its_command_and_checks_its_settings():
    def dry(**settings):
        environment = {**os.environ, "DRY_RUN": "1", **settings}
        command = ["bash", str(ROOT / "launch" / "deepspeed.sh"), "train.py", "--lr", "0.1"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    printed = dry(RANKS="2", PORT="1234").stdout
    assert "OMP_NUM_THREADS=" in printed
    assert "--master_port 1234" in printed
    assert "--num_accelerators 2 train.py --lr 0.1" in printed
    assert "HOSTFILE must be a file" in dry(HOSTFILE="/nowhere").stderr
    assert "RANKS must be a number" in dry(RANKS="two").stderr
