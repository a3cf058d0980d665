"""flwr's simulation (Ray) with the Message API: a SuperLink of its own, and `flwr run` of the app in flwr_app/.

Telemetry and update checks are off, see federated_peers.py. The app's processes inherit PYTHONPATH and the affinity.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from task import load_data, read_task

PROGRAMS = Path(sys.executable).parent
APP = Path(__file__).parent / "flwr_app"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


path = Path(sys.argv[1]).resolve()
task = read_task(str(path))
port = free_port()
os.environ["PATH"] = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"  # where a SuperLink looks for its own programs
home = Path(os.environ["FLWR_HOME"])
(home / "config.toml").write_text(f'[superlink.benchmark]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
nodes = f"num-supernodes={len(load_data(task.folder).parts)} client-resources-num-cpus=1"
link = [PROGRAMS / "flower-superlink", "--insecure", "--simulation", "--port", str(port)]
with (home / "superlink.log").open("w") as log:
    superlink = subprocess.Popen(link, stdout=log, stderr=log)
try:
    wait_for(port)
    subprocess.run(
        [
            PROGRAMS / "flwr", "run", str(APP), "benchmark", "--stream", "--run-config", f'task="{path}"',
            "--federation-config", f"{nodes} init-args-num-cpus={task.processes}",
        ],
        check=True,
    )  # fmt: skip
finally:
    superlink.terminate()
    superlink.wait(60)
