"""Real gloo ranks for tests: processes that stay up, run functions by name and report their tracebacks.

Every call has a deadline. After a failure or a missed deadline the pool's processes, and only those, are killed; the
next call starts new ones.
"""

import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# The fork server imports torch once, before it has threads; ranks then start in a moment. The first optimizer of a
# process imports torch._dynamo.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.nn.parallel", "torch._dynamo", "distopt"])

DEADLINE_S = 240.0  # against tests that hang: a busy machine may be ten times slower than a quiet one
_GRACE_S = 3.0  # how long the other ranks may take to report after one has failed


class RankFailure(AssertionError):
    """A rank raised or did not answer; the message holds the tracebacks."""


class RankPool:
    """`size` processes in one gloo group. Call it with a module-level function; every rank runs it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = DEADLINE_S,
        grace_s: float = _GRACE_S,
        **kwargs: Any,
    ) -> list:
        """The function's results in rank order. Raises `RankFailure` with the tracebacks of the ranks that raised.

        After a failure the others have `grace_s` to report; give more where they are meant to go on.
        """
        if any(not process.is_alive() for process in self._processes):
            self.close()  # ended between two calls
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + deadline_s
        while len(results) + len(failures) < self.size:
            waiting = [p for r, p in enumerate(self._pipes) if r not in results and r not in failures]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    outcome, value = pipe.recv()
                except EOFError:
                    outcome, value = "failed", "the process died"
                (results if outcome == "done" else failures)[rank] = value
                if outcome == "failed":
                    end = min(end, time.monotonic() + grace_s)
        if failures or len(results) < self.size:
            silent = sorted(set(range(self.size)) - set(results) - set(failures))
            self._show_stacks(silent)
            self.close()
            report = "".join(f"\n--- rank {rank} ---\n{text}" for rank, text in sorted(failures.items()))
            raise RankFailure(f"{function.__name__}: no answer from ranks {silent} within the deadline{report}")
        return [results[rank] for rank in range(self.size)]

    def _show_stacks(self, ranks: list[int]) -> None:
        """Lets these ranks print where each of their threads is."""
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5 if ranks else 0.0)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, store: str, pipe: multiprocessing.connection.Connection) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # collections need not look through all of torch
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=DEADLINE_S)
    )
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            outcome = ("done", function(*args, **kwargs))
        except BaseException:
            outcome = ("failed", traceback.format_exc())
        pipe.send(outcome)
