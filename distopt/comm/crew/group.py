"""A gloo group whose members find each other at a board."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]  # torch has it, its stubs do not

_FORM_S = 15.0  # for the group's connections


class BoardStore(Store):
    """What members of a crew lay down for each other at their lead's board, as a store for gloo.

    Args:
        ask: Asks the board.
        window: The number of the crew's meeting.
        within_s: For what the others lay down.
    """

    def __init__(self, ask: Callable[[Mapping[str, Any]], Any], window: int, within_s: float = _FORM_S) -> None:
        super().__init__()
        self._ask, self._window, self._within_s = ask, window, within_s
        self._seen: dict[str, Any] = {}

    def lay_down(self, values: Mapping[str, Any], forget: str | None = None) -> None:
        """For the others, by key; anything that JSON can hold. What lies under the key `forget` is taken away."""
        self._ask({"kind": "put", "window": self._window, "values": dict(values), "forget": forget})

    def await_all(self, keys: Sequence[str]) -> list[Any]:
        """What was laid down under these keys, once all is there."""
        missing = [key for key in keys if key not in self._seen]
        if missing:
            question = {"kind": "get", "window": self._window, "keys": missing, "within_s": self._within_s}
            self._seen.update(self._ask(question)["values"])
        return [self._seen[key] for key in keys]

    # -- what gloo calls ---------------------------------------------------------------------------------------------

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # gloo gives bytes
        """See `torch.distributed.Store`."""
        self.lay_down({key: value.hex()})

    def get(self, key: str) -> bytes:
        """See `torch.distributed.Store`."""
        return bytes.fromhex(self.await_all([key])[0])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """See `torch.distributed.Store`."""
        self.await_all(keys)


def form_group(store: BoardStore, place: int, size: int, interface: str) -> Any:
    """A gloo group. All members call it.

    Args:
        store: Of the crew.
        place: Of this rank in the group.
        size: Of the group.
        interface: Address of this machine that the others reach.

    Raises:
        RuntimeError: A member has not connected within the time.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in the stubs either
    options._timeout = timedelta(seconds=_FORM_S)
    options._devices = [ProcessGroupGloo.create_device(hostname=interface)]
    return ProcessGroupGloo(store, place, size, options)
