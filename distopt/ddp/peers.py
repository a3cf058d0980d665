"""What an attachment does about the other ranks: it watches them, and when some are lost it ends this rank's waiting.

The heartbeat says who is gone. Then the collectives under way never complete, so the hook completes its buckets by
itself and the error is raised at `optimizer.step()`; where the main thread waits in a collective that is not ours, the
process ends with the error printed.

Limits: as long as no peer is lost this costs a datagram per second; `peer_timeout=0` leaves it out.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from distopt.comm import Heartbeat, await_at_exit, end_when_stuck, leak_process_groups, open_heartbeat
from distopt.errors import DistoptError, PeerLostError

_log = logging.getLogger("distopt")


class Peers:
    """The other ranks of an attachment; nobody is watched before `watch`.

    Attributes:
        error: Who is lost, or None.
    """

    def __init__(self) -> None:
        self.error: PeerLostError | None = None
        self._heartbeat: Heartbeat | None = None
        self._why_off = "there are no other ranks"
        self._fail: Callable[[], Callable[[DistoptError], None] | None] = lambda: None
        self._timeout_s = 0.0
        self._told = threading.Event()
        self._waiting: set[threading.Event] = set()
        self._lock = threading.Lock()

    def watch(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout_s: float,
        fail: Callable[[DistoptError], None],
    ) -> None:
        """Starts the heartbeats, unless `timeout_s` is 0. Collective.

        Args:
            group: The ranks.
            device: Where the group's backend wants its tensors.
            timeout_s: A rank that is silent for so long is lost.
            fail: A method that ends all waiting of its object, which is not kept alive; called in a thread.
        """
        if not timeout_s:
            self._why_off = "peer_timeout is 0"
        elif group.size() > 1:
            self._timeout_s = timeout_s
            self._fail = weakref.WeakMethod(fail)
            self._heartbeat, self._why_off = open_heartbeat(group, device, timeout_s=timeout_s, on_loss=self._lost)
            if self._heartbeat is None and group.rank() == 0:
                _log.warning("lost peers will not be noticed, a collective waits for them: %s", self._why_off)

    def wait(self, future: "Future[Any]") -> None:
        """Waits for a collective, but not for one that a lost rank takes part in.

        Raises:
            PeerLostError: Ranks are lost, or the collective failed because of that.
            Exception: What else it failed with.
        """
        done = threading.Event()

        def wake(_: "Future[Any]") -> None:
            done.set()

        with self._lock:
            self._waiting.add(done)
        await_at_exit(wake)
        future.then(wake)
        del wake
        if self.error is None:
            done.wait()
        with self._lock:
            self._waiting.discard(done)
        if self.error is not None:
            raise self.error
        try:
            future.wait()  # on CUDA the stream waits
        except Exception as problem:
            explained = self.explain(problem)
            if explained is problem:
                raise
            raise explained from problem

    def explain(self, problem: Exception) -> Exception:
        """What to report for a collective that failed: who is lost, if that is why. Takes a few beats."""
        if self._heartbeat is None:
            return problem
        return self._heartbeat.wait_for_verdict() or problem

    def tell(self) -> None:
        """The user is given the error now: what happens next is up to the script."""
        self._told.set()

    def stats(self) -> dict[str, Any]:
        """Whether the peers are watched ("on"), why not ("off") or who is "lost", with the heartbeat's own numbers."""
        if self._heartbeat is None:
            return {"state": "off", "reason": self._why_off}
        return {"state": "lost" if self.error else "on", **self._heartbeat.stats()}

    def close(self, *, failed: bool = False) -> None:
        """Says goodbye to the others, or that this rank has failed."""
        if self._heartbeat is not None:
            self._heartbeat.close(failed=failed)

    def _lost(self, error: PeerLostError) -> None:
        self.error = error
        try:
            leak_process_groups()
        except Exception:  # it asks torch for what is not public
            _log.exception("process groups could not be kept: the process may hang when it ends")
        with self._lock:
            for waiting in self._waiting:
                waiting.set()
        fail = self._fail()
        if fail is not None:
            fail(error)
        del fail
        end_when_stuck(error, self._told, self._timeout_s, lambda: self._fail() is not None)
