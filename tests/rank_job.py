"""Jobs of ranks that have no agent: each a process of its own, which a test may kill, stop and start."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

DEADLINE_S = 120.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """Starts ranks of a module whose `main` says what happens; a context manager that ends what is left of them."""

    module = "fault_rank"

    def __init__(self, warm_python, folder, size, algorithms, *, lr=0.0, master="127.0.0.1", **options):
        self._python, self.folder, self.size = warm_python, Path(folder), size
        self.folder.mkdir(exist_ok=True)
        self._options = {"algorithms": {name: each.to_dict() for name, each in algorithms.items()}, "lr": lr, **options}
        self._master = {"MASTER_ADDR": master, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        self.scripts = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for script in self.scripts.values():
            if script.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(script.pid, signal.SIGCONT)
            script.kill()
            script.wait()

    def start(self, ranks=None, **options):
        for rank in range(self.size) if ranks is None else ranks:
            own = {key: value[rank] if isinstance(value, list) else value for key, value in options.items()}
            environment = own.pop("environment", {})
            given = {**self._options, "folder": str(self.folder), "label": str(rank), "number": rank, **own}
            code = f"import {self.module}; {self.module}.main()"
            self.scripts[rank] = self._python.start(
                code, json.dumps(given), path=None, RANK=str(rank), **self._master, **environment
            )
        return self

    def kill(self, *ranks):
        for rank in ranks:
            os.kill(self.scripts[rank].pid, signal.SIGKILL)
        for rank in ranks:
            self.scripts[rank].wait()

    def signal(self, rank, number):
        os.kill(self.scripts[rank].pid, number)

    def stop(self):
        """Tells all to end, and waits for it."""
        (self.folder / "stop").touch()
        for rank, script in self.scripts.items():
            if script.returncode is None:
                output = script.communicate(DEADLINE_S)
                assert script.returncode == 0, (rank, output)
                warnings = [line for line in output[1].splitlines() if "[W" in line and "hostname" not in line]
                assert not warnings, warnings  # of torch's C++

    def events(self, rank, kind, name=None):
        path = self.folder / f"{rank}.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]  # what follows the last end of line is not whole yet
        found = [json.loads(line) for line in lines]
        return [each for each in found if each["event"] == kind and name in (None, each.get("name"))]

    def wait(self, condition, what):
        """Until the condition holds; fails at the deadline, or when a rank ends before."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {DEADLINE_S} s\n{self.told()}"
            assert not any(self.events(rank, "failed") for rank in self.scripts), self.told()
            time.sleep(0.03)

    def wait_for_rounds(self, ranks, least=10):
        """Until each attachment of these ranks has made so many exchanges since now."""
        before = {rank: self._rounds(rank) for rank in ranks}
        self.wait(
            lambda: all(
                self._rounds(rank)
                and all(r >= before[rank].get(name, 0) + least for name, r in self._rounds(rank).items())
                for rank in ranks
            ),
            f"{least} exchanges of ranks {list(ranks)}",
        )

    def _rounds(self, rank):
        found = self.events(rank, "steps")
        return found[-1]["rounds"] if found else {}

    def wait_for(self, ranks, kind, count=1, names=("",)):
        """Until these ranks have said so much, for each of the attachments."""
        self.wait(
            lambda: all(len(self.events(rank, kind, name or None)) >= count for rank in ranks for name in names),
            f"{kind} of ranks {list(ranks)}",
        )

    def told(self):
        """The last that each rank has said, for messages."""
        texts = []
        for script in self.scripts.values():
            if script.returncode is None:
                os.kill(script.pid, signal.SIGUSR1)  # prints where each of its threads is
        time.sleep(0.5)
        for rank, script in self.scripts.items():
            path = self.folder / f"{rank}.jsonl"
            last = path.read_text().splitlines()[-3:] if path.exists() else []
            texts.append(
                f"--- rank {rank} ---\n" + "\n".join(line[:300] for line in last) + script._written()[1][-3000:]
            )
        return "\n".join(texts)
