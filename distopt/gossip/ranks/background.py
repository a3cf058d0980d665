"""One thread that makes exchanges while the next gradients are computed."""

import threading
from collections.abc import Callable


class Background:
    """A task in a thread of its own.

    Args:
        task: What to do; its exception is raised again by `result`.
    """

    def __init__(self, task: Callable[[], None]) -> None:
        self._task = task
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="distopt-gossip", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._task()
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
