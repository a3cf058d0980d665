"""Flower's programs as processes that tests start, and end by their ids: none outlives a test, or goes online."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from credentials import make_certificates

APP = Path(__file__).parent / "app"
PROGRAMS = Path(sys.executable).parent


def environment(home):
    """Of all of Flower's programs: nothing is asked or told to other machines."""
    return os.environ | {
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Flower:
    """A SuperLink, perhaps SuperNodes, and runs on them."""

    def __init__(self, home, *, simulation=False, secure=False, variables=None):
        self.home = Path(home)
        self.variables = environment(self.home) | (variables or {})
        self.port = free_port()
        self.started = []
        kind = ["--simulation"] if simulation else []
        link, self.node_security, said = ["--insecure"], ["--insecure"], "insecure = true"
        if secure:
            make_certificates(self.home)
            names = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.crt"}
            link = [part for name, file in names.items() for part in (f"--ssl-{name}", str(self.home / file))]
            link.append("--enable-supernode-auth")
            self.node_security = ["--root-certificates", str(self.home / "ca.crt")]
            said = f'root-certificates = "{self.home / "ca.crt"}"'
        self.superlink = self.start("superlink", "flower-superlink", *kind, *link, "--port", str(self.port))
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\n{said}\n'
        )
        self._wait_for_port()

    def start(self, name, program, *arguments):
        """A program in a group of its own, its output in a file."""
        log = (self.home / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [PROGRAMS / program, *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.variables,
            start_new_session=True, cwd=self.home,
        )  # fmt: skip
        self.started.append(process)
        return process

    def supernode(self, client, *options):
        """The node of a client; its process id lies in the home's "pids"."""
        process = self.start(
            f"supernode-{client}", "flower-supernode", *self.node_security, *options,
            "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f"partition-id={client}",
        )  # fmt: skip
        pids = self.home / "pids"
        pids.mkdir(exist_ok=True)
        (pids / str(client)).write_text(str(process.pid))
        return process

    def run(self, app=APP, *, job=None, config=(), num_nodes=None, stream=True, deadline_s=1100):
        """`flwr run`; its exit status, and what it printed, with `stream` until the run is over."""
        command = ["run", str(app), "test", *(["--stream"] if stream else [])]
        if job is not None:
            job = {"out": str(self.home / "left.pt"), "pids": str(self.home / "pids"), **job}
            command += ["--run-config", f"job='{json.dumps(job)}'"]
        for each in config:
            command += ["--run-config", each]
        if num_nodes is not None:
            nodes = f"num-supernodes={num_nodes} client-resources-num-cpus=1 init-args-num-cpus=2"
            command += ["--federation-config", nodes]
        return self.flwr(*command, deadline_s=deadline_s)

    def flwr(self, *command, deadline_s=240):
        """Flower's command line; its exit status, and what it printed."""
        done = subprocess.run(
            [PROGRAMS / "flwr", *command], capture_output=True, text=True, env=self.variables, timeout=deadline_s,
            cwd=self.home, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def left(self, job, **how):
        """What the test app's server left of each of the job's jobs."""
        (self.home / "left.pt").unlink(missing_ok=True)
        _, printed = self.run(job=job, **how)
        assert (self.home / "left.pt").exists(), f"the server app left nothing:\n{printed}\n{self.logs()}"
        return torch.load(self.home / "left.pt", weights_only=True)

    def logs(self):
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.home.glob("*.log")
        )

    def close(self):
        for process in reversed(self.started):
            end_group(process)
        wait_for_end(self.home)

    def _wait_for_port(self, deadline_s=240):
        until = time.monotonic() + deadline_s
        while time.monotonic() < until and self.superlink.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink does not listen:\n{self.logs()}")


def processes_of(home):
    """The ids of all that runs with this home, however it was started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or is not ours
        if f"FLWR_HOME={home}".encode() in variables:
            found.append(int(folder.name))
    return found


def wait_for_end(home, deadline_s=120):
    """Until nothing runs with this home any more; an error if something goes on."""
    until = time.monotonic() + deadline_s
    while left := processes_of(home):
        if time.monotonic() > until:
            names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in left]
            raise RuntimeError(f"these outlive the test: {names}")
        time.sleep(0.2)


def end_group(process, patience_s=20):
    """Ends a process that `start` began, and what it has started itself, by their group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
