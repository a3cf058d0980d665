"""One thread that runs an exchange of several phases while the backward pass goes on.

Phases depend on each other, and a collective may neither be started nor awaited inside a future's callback (on gloo
that hangs or corrupts). So a thread of its own waits for them, one bucket after the other, which keeps the order of
collectives equal on all ranks; its process groups belong to it alone. On CUDA no thread is needed: waiting for a
collective only makes the stream wait, so the phases are put on a side stream at once.
"""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

import torch

from distopt.comm.lifetime import KeptUntilDone

_open: "weakref.WeakSet[SerialWorker]" = weakref.WeakSet()


class SerialWorker:
    """Runs tasks in the order in which they are handed in.

    Args:
        device: Where the tasks' tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept = KeptUntilDone()
        _open.add(self)

    def submit(self, task: Callable[[], None]) -> None:
        """Runs the task behind those before it. It must not raise."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                task()
                self._kept.keep(task, self._device)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._tasks,), name="distopt-exchange", daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the thread behind the last task; a task that hangs is left behind after `timeout_s`."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(timeout_s)
            self._thread = None


def _run(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # what it holds is not needed while waiting for the next


@atexit.register
def _close_all() -> None:
    """A thread that still waits when Python shuts down could abort the process (see `distopt.comm.shutdown`)."""
    for worker in list(_open):
        worker.close()
