"""A quiet end of the process: callbacks that collectives still run are waited for before Python shuts down.

The threads of a process group take the interpreter's lock to run a callback, to drop it and to drop tensors. Python
before 3.14 ends a thread that asks for the lock while the interpreter shuts down, and C++ answers that with an abort
("terminate called without an active exception", cpython issue 87135): on a busy machine a script that ends right after
its last step would now and then exit with -6 although all was done, and torchrun would start it again.

Limits: waits at most a second, for callbacks of a peer that died never run.
"""

import atexit
import functools
import time
import weakref
from collections.abc import Callable
from typing import Any

_DEADLINE_S = 1.0
_POLL_S = 0.001
_LAST_STEPS_S = 0.02  # from dropping the callback to the thread's rest: a few microseconds of C++, once it is scheduled

_pending: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()


def await_at_exit(callback: Callable[..., Any]) -> None:
    """Makes the end of the process wait until this callback has run and been dropped.

    Args:
        callback: A function of its own that is handed to a collective's future, and to nobody else.
    """
    _register()
    _pending.add(callback)


def end_quietly() -> None:
    """Makes the end of the process wait a moment for threads that still drop the tensors of collectives.

    For whoever waits for collectives and has no callbacks: `wait` returns before the group's thread lets go of them.
    """
    _register()


@functools.cache
def _register() -> None:
    atexit.register(_wait)


def _wait() -> None:
    end = time.monotonic() + _DEADLINE_S
    while len(_pending) and time.monotonic() < end:
        time.sleep(_POLL_S)  # gives the interpreter's lock away
    time.sleep(_LAST_STEPS_S)
