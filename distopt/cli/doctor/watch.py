"""The last resort of the deadline: a process that waits where nothing can wake it, as in a store that is cut off."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_GRACE_S = 5.0


@contextlib.contextmanager
def ends_by(deadline_s: float, status: int) -> Iterator[None]:
    """Ends this process, with one line and this status, if the block takes some seconds longer than the deadline."""

    def end() -> None:
        print(
            f"distopt: no answer within {deadline_s:g} s: the store of the job, which is with rank 0, hangs; see "
            "whether that host is stopped or cut off",
            file=sys.stderr,
            flush=True,
        )
        os._exit(status)

    timer = threading.Timer(deadline_s + _GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
