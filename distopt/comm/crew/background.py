"""One thread that makes exchanges while the next gradients are computed."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class Background:
    """A task in a thread of its own, and on the GPU in streams of its own.

    There it begins when all is done that the caller has asked of the GPU so far, and it is over when its own work on
    the GPU is: so the caller may go on computing, in whatever stream, and then use what the task has made.

    Args:
        task: What to do; its exception is raised again by `result`.
        streams: One for each GPU that it uses; see `streams_of`.
    """

    def __init__(self, task: Callable[[], None], streams: Sequence[torch.cuda.Stream] = ()) -> None:
        self._task, self._streams = task, streams
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="distopt-exchange", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as inside:
                for stream in self._streams:
                    inside.enter_context(torch.cuda.stream(stream))
                self._task()
            for stream in self._streams:
                stream.synchronize()
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether it is."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Waits until it is; raises what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def streams_of(tensors: Iterable[Tensor]) -> list[torch.cuda.Stream]:
    """A new stream on each GPU that one of them is on."""
    devices = {tensor.device.index: tensor.device for tensor in tensors if tensor.is_cuda}
    return [torch.cuda.Stream(device) for device in devices.values()]
