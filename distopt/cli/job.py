"""Training runs under torchrun: what to train, starting the ranks, following them and stopping them at a deadline.

Limits: one host, gloo on CPU. Only processes that were started here are ever signalled.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distopt.errors import DistoptError

Event = Mapping[str, Any]
_POLL_S = 0.1
_GRACE_S = 10.0


class JobError(DistoptError, RuntimeError):
    """A training run failed or ran past its deadline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training run. Runs that differ only in `algorithm` start from the same weights and see the same batches."""

    algorithm: dict[str, Any]  # as distopt.from_config takes it
    model: str  # a name of a distopt.cli.models.Model
    data: str | None  # as distopt.cli.datasets.load takes it
    ranks: int
    steps: int
    evaluate_every: int  # steps between two evaluations; the last step is always evaluated
    batch: int  # per rank
    lr: float  # at the start; falls to 0 along a cosine
    momentum: float
    weight_decay: float
    seed: int  # of the initial weights and of the order of the data


def write_jobs(jobs: Mapping[str, Job], path: Path) -> None:
    """Writes jobs, by label, as JSON."""
    path.write_text(json.dumps({label: dataclasses.asdict(job) for label, job in jobs.items()}, indent=2) + "\n")


def read_jobs(path: Path) -> dict[str, Job]:
    """The jobs that `write_jobs` wrote."""
    return {label: Job(**fields) for label, fields in json.loads(path.read_text()).items()}


def launch(
    jobs: Mapping[str, Job], folder: Path, *, deadline_s: float, on_event: Callable[[Event], None]
) -> dict[str, dict[str, Any]]:
    """Trains the jobs one after the other under one torchrun, and returns the result of each, by label.

    One torchrun, because starting the ranks and importing torch takes longer than a short training.

    Args:
        jobs: What to train, by label; all with the same number of ranks.
        folder: Takes jobs.json, events.jsonl and torchrun.log; those of an earlier launch are replaced.
        deadline_s: Seconds after which all is stopped and counts as failed.
        on_event: Called with each event while the training goes on (see `distopt.cli.worker`).

    Raises:
        JobError: A rank failed or the deadline passed; the message holds the end of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec, events, log = folder / "jobs.json", folder / "events.jsonl", folder / "torchrun.log"
    write_jobs(jobs, spec)
    events.write_text("")
    (ranks,) = {job.ranks for job in jobs.values()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--module", "distopt.cli.worker", str(spec), str(events)]
    # One thread per rank: ranks share this host's cores, and the runs stay comparable.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pids: list[int] = []
    results: dict[str, dict[str, Any]] = {}
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        ) as process,
    ):
        try:
            for event in _follow(events, process, deadline_s):
                if event["event"] == "joined":
                    pids.append(event["pid"])
                elif event["event"] == "finished":
                    results[event["label"]] = event["result"]
                on_event(event)
        finally:
            _stop(process, pids)
    if process.returncode == 0 and len(results) == len(jobs):
        return results
    raise JobError(
        f"training must finish within {deadline_s:g} s without an error, it ended with exit code {process.returncode} "
        f"and {len(results)} of {len(jobs)} runs; the log {log} ends:\n{_tail(log)}"
    )


def _follow(events: Path, process: subprocess.Popen[bytes], deadline_s: float) -> Iterator[Event]:
    """Yields the run's events as they are written, until it ends or the deadline passes."""
    end = time.monotonic() + deadline_s
    with events.open() as lines:
        while True:
            ended = process.poll() is not None or time.monotonic() > end
            for line in lines:
                yield json.loads(line)
            if ended:
                return
            time.sleep(_POLL_S)


def _stop(process: subprocess.Popen[bytes], pids: list[int]) -> None:
    """Ends what is still going: torchrun ends its workers on SIGTERM; what outlives that is killed by its id."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()


def _tail(log: Path, num_lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
