"""Keeping tensors alive while a stream other than their own still uses them.

CUDA's caching allocator reuses a freed tensor's memory as soon as the stream on which it was made gets there; it knows
nothing of other streams. So what a side stream works on is held until that stream has passed an event behind the work.
"""

import collections

import torch


class KeptUntilDone:
    """Holds things until the work queued so far on the current stream is done. On the CPU it holds nothing."""

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[torch.cuda.Event, object]] = collections.deque()

    def keep(self, thing: object, device: torch.device) -> None:
        """Holds `thing`, whose tensors live on `device`, and lets go of what is done."""
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self._kept.append((event, thing))
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
