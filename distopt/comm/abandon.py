"""The end of a process whose collectives never complete, because ranks are lost.

On gloo nothing wakes a thread that waits for a lost rank (`abort` does nothing there, as of torch 2.13), and the
destructor of a process group waits for all that was ever queued: so a script that has its exception, or its exit
status, would hang while Python shuts down. And a main thread that waits in a collective of its own (a barrier, DDP's
broadcast of buffers) never gets to see an exception at all.
"""

import atexit
import ctypes
import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from distopt.errors import DistoptError

_TORCH = os.path.dirname(torch.__file__) + os.sep


_lost: list[bool] = []


def leak_process_groups() -> None:
    """Keeps all process groups from being destroyed, ever: for a process that is about to end.

    If an exception ends the script, the process then ends without shutting Python down: callbacks of collectives that
    break meanwhile, because the other ranks end too, would abort it.
    """
    _lost.append(True)
    for group in list(dist.distributed_c10d._world.pg_map):
        _leak(group)
        for device in group._device_types:
            _leak(group._get_backend(device))


def _leak(what: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))  # a reference from Python is dropped when Python shuts down


def end_when_stuck(error: DistoptError, told: threading.Event, patience_s: float, concerns: Callable[[], bool]) -> None:
    """Ends this process, with the error on standard error and status 1, once its main thread is stuck.

    Returns only when `concerns` says no: whose error it is has gone, and the script has gone on to other things.

    Stuck means: at one instruction for `patience_s`. While nobody has been told of the error that is so anywhere;
    after that only inside torch, because a script that has caught it may well wait for something else.
    """
    spot, since = None, time.monotonic()
    while True:
        time.sleep(min(1.0, patience_s / 10))
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        here = None if frame is None else (id(frame), frame.f_lasti)
        if here != spot or (told.is_set() and frame is not None and not frame.f_code.co_filename.startswith(_TORCH)):
            spot, since = here, time.monotonic()
        elif time.monotonic() - since > patience_s:
            gc.collect()  # models are in cycles
            if not concerns():
                return
            _end(error, frame, patience_s)


@atexit.register
def _end_at_once() -> None:
    if _lost and getattr(sys, "last_value", None) is not None:  # an exception that nobody caught: the status is 1
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _end(error: DistoptError, frame: FrameType | None, patience_s: float) -> None:
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    print(
        f"{stack}distopt.errors.{type(error).__name__}: {error}\nSince then the main thread has been waiting at the "
        f"place above for {patience_s:g} s, where no exception can reach it: this process ends here.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
