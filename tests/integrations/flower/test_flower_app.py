"""examples/flower_app under `flwr run`, as docs/federated/flower.md says, and what that leaves behind."""

import re
import shlex
import signal
import socket
import subprocess
import sys
from os import kill
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower has an environment of its own: make test-flower")

from flower_processes import PROGRAMS, environment, processes_of, wait_for_end

from distopt.job import from_config

ROOT = Path(__file__).parents[3]
APP = ROOT / "examples" / "flower_app"
PAGE = (ROOT / "docs" / "federated" / "flower.md").read_text()
LOCAL_PORT = 39091  # of the SuperLink that `flwr run` starts; Flower has no setting for it
LAST_LINE = re.compile(r"^test accuracy .*$", re.MULTILINE)


def test_the_page_shows_the_code_of_the_app():
    blocks = re.findall(r"^```py\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for path, code in blocks:
        assert code in (ROOT / path).read_text()


def test_the_settings_of_the_app_make_an_algorithm():
    import tomllib

    config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    made = from_config({"algorithm": config["algorithm"], **tomllib.loads(config["options"])})
    assert made.name == "fedau"


@pytest.mark.job
@pytest.mark.timeout(1200)
def test_flwr_run_prints_what_the_simulation_prints_and_its_daemon_is_ended_by_its_id(tmp_path):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", LOCAL_PORT)) == 0:
            pytest.skip(f"somebody else's SuperLink has port {LOCAL_PORT}, and flwr run would use it")
    command = next(line for line in PAGE.splitlines() if line.startswith("flwr run . local"))
    variables = environment(tmp_path)
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "RAY_USAGE_STATS_ENABLED"):
        assert f"{name}={variables[name]}" in PAGE
    try:
        ran = subprocess.run(
            [PROGRAMS / "flwr", *shlex.split(command)[1:]], cwd=APP, env=variables, capture_output=True, text=True,
            timeout=800, check=True,
        )  # fmt: skip
        expected = subprocess.run(
            [sys.executable, "-m", "digits.simulation"], cwd=APP, env=variables, capture_output=True, text=True,
            timeout=240, check=True,
        )  # fmt: skip
        assert LAST_LINE.search(ran.stdout + ran.stderr)[0] == LAST_LINE.search(expected.stdout)[0]
        assert LAST_LINE.search(expected.stdout)[0] in PAGE
        daemons = [pid for pid in processes_of(tmp_path) if b"flower-superlink" in command_line(pid)]
        assert len(daemons) == 1  # `flwr run` leaves it
        assert f"{tmp_path}/local-superlink/superlink.log".encode() in command_line(daemons[0])  # as the page finds it
    finally:
        for pid in processes_of(tmp_path):
            if b"flower-superlink" in command_line(pid):
                kill(pid, signal.SIGTERM)
    wait_for_end(tmp_path)


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
