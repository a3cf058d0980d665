"""Seconds per round of examples/flower_app under Flower's simulation engine and between a SuperLink and SuperNodes.

    .venv-flower/bin/python benchmarks/flower_rounds.py --json benchmarks/results/flower_rounds.json

Everything runs on this machine, one torch thread for each process. The simulation has 100 nodes, of which about ten
take part in a round; the SuperLink has two, of which both do. A round is from one line of the log to the next, on
average over all but the first; the start counts from `flwr run` to the end of the first round, and the SuperLink is
there already. The machine's load is noted, because other work makes all of it longer.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from distopt.cli.machine import machine, versions

PROGRAMS = Path(sys.executable).parent
APP = Path(__file__).parents[1] / "examples" / "flower_app"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Engine:
    """A SuperLink of its own, and what runs with it."""

    def __init__(self, home: Path, *, simulation: bool) -> None:
        self.home, self.port = home, free_port()
        self.variables = os.environ | {
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        (home / "config.toml").write_text(f'[superlink.own]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n')
        self.started: list[subprocess.Popen] = []
        self.start("flower-superlink", *(["--simulation"] if simulation else []), "--port", str(self.port))
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            time.sleep(0.1)

    def start(self, program: str, *arguments: str) -> None:
        with (self.home / "log").open("a") as log:
            command = [PROGRAMS / program, "--insecure", *arguments]
            self.started.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self.variables, start_new_session=True)
            )

    def node(self, client: int) -> None:
        address = f"127.0.0.1:{self.port}"
        config = f"partition-id={client}"
        self.start("flower-supernode", "--superlink", address, "--port", str(free_port()), "--node-config", config)

    def measure(self, *options: str) -> dict[str, float]:
        """Of one `flwr run`."""
        began, ends = time.monotonic(), []
        command = [PROGRAMS / "flwr", "run", str(APP), "own", "--stream", *options]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.variables
        ) as run:
            assert run.stdout is not None
            for line in run.stdout:
                print(line, end="", flush=True)
                if "[ROUND " in line:
                    ends.append(time.monotonic())
        return {"start_s": ends[0] - began, "round_s": (ends[-1] - ends[0]) / (len(ends) - 1), "rounds": len(ends)}

    def close(self) -> None:
        for process in reversed(self.started):
            os.killpg(process.pid, 15)
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file of the results")
    options = parser.parse_args()
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Path(folder), simulation=True)
        try:
            nodes = "num-supernodes=100 client-resources-num-cpus=1"
            measured["simulation engine"] = engine.measure("--federation-config", nodes)
        finally:
            engine.close()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Path(folder), simulation=False)
        try:
            for client in range(2):
                engine.node(client)
            measured["superlink"] = engine.measure("--run-config", "clients=2 rounds=11 everybody=true")
        finally:
            engine.close()
    print(json.dumps(measured, indent=1))
    if options.json is not None:
        known = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "versions": versions()}
        known["load"] = os.getloadavg()[1]  # processes that wanted a core, over the last 5 minutes
        options.json.write_text(json.dumps({**known, "flwr": version("flwr"), **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
