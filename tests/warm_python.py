"""Scripts in processes of their own that have imported torch already, which takes a new Python three seconds.

A server imports what is slow and knows nothing of distopt; each script is a fork of it, with arguments, environment,
folder and output of its own. It runs as `__main__` and ends as any script does: its uncaught exception is Python's to
report, and Python shuts down for real. For what matters before torch is imported there is `subprocess`.
"""

import contextlib
import gc
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

SLOW = ("torch.nn.parallel", "torch._dynamo", "torch.distributed.checkpoint")
_NUMBER = struct.Struct("i")


class Script:
    """A script that runs or has ended, used as a `subprocess.Popen`."""

    def __init__(self, name, report, output, errors):
        self.args, self.returncode = name, None
        self._report, self._output, self._errors = report, output, errors
        self.pid = self._told()

    def wait(self, timeout=240.0):
        """The exit status, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout, *self._written())
            self.returncode = os.waitstatus_to_exitcode(self._told())
            os.close(self._report)
        return self.returncode

    def communicate(self, timeout=240.0):
        """Waits for the end: what was written to standard output and standard error."""
        self.wait(timeout)
        return self._written()

    def says(self, pattern, timeout=240.0):
        """Waits for something on standard output; the match."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self._written()[0])):
            assert time.monotonic() < end, f"nothing like {pattern} in {self._written()}"
            assert not select.select([self._report], [], [], 0.05)[0] or re.search(pattern, self._written()[0]), (
                f"it has ended and not said {pattern}: {self._written()}"
            )
        return found

    def kill(self):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _written(self):
        return [Path(file.name).read_text() for file in (self._output, self._errors)]

    def _told(self):
        told = os.read(self._report, _NUMBER.size)
        assert told, "the server has died"
        return _NUMBER.unpack(told)[0]


class WarmPython:
    """Starts scripts until `close`."""

    def __init__(self):
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def start(self, code, *arguments, path=None, cwd=None, **environment):
        """Starts `python -c code`; it imports from the folder `path`, or from where the tests themselves do."""
        request = {
            "code": code,
            "arguments": ["-c", *map(str, arguments)],
            "path": [os.path.abspath(folder) for folder in sys.path] if path is None else [str(path)],
            "cwd": str(cwd or os.getcwd()),
            "environment": {**os.environ, **environment},
        }
        # no `with`: they are the script's until it has ended, and close with it
        output, errors = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        report, theirs = os.pipe()
        descriptors = [output.fileno(), errors.fileno(), theirs]
        socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
        os.close(theirs)
        return Script(request["arguments"], report, output, errors)

    def run(self, code, *arguments, timeout=240.0, **options):
        """As `subprocess.run`, with the output as text."""
        script = self.start(code, *arguments, **options)
        try:
            written = script.communicate(timeout)
        finally:
            script.kill()
            script.wait()
        return subprocess.CompletedProcess(script.args, script.returncode, *written)

    def close(self):
        self._channel.close()
        self._server.wait()


# -- the server ----------------------------------------------------------------------------------------------------


def _serve(channel):
    """Returns what is to be run, in the process that shall run it; never in the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while True:
        request, descriptors, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not request:
            os._exit(0)  # the tests have ended
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    channel.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *output, report = descriptors
    script = os.fork()
    if script:
        _keep(script, report)
    os.close(report)
    for number, descriptor in enumerate(output, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return json.loads(request)


def _keep(script, report):
    """Tells the script's number and, when it has ended, how."""
    os.write(report, _NUMBER.pack(script))
    status = os.waitpid(script, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        os.write(report, _NUMBER.pack(status))
    os._exit(0)


def _become(request):
    """Makes this process what was asked for; returns its code and its namespace."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["arguments"]
    sys.path[:0] = request["path"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return compile(request["code"], "<string>", "exec"), main.__dict__


if __name__ == "__main__":
    for _name in SLOW:
        __import__(_name)
    gc.freeze()  # a collection in a script need not look through all of torch
    exec(*_become(_serve(socket.socket(fileno=int(sys.argv[1])))))
