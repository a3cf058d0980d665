"""Which parameters the backward pass reached since the last synchronised step.

With find_unused_parameters or static_graph, DDP hands a hook zeros for a parameter that took no part, and throws the
hook's result away if it took no part on any rank. What such a step selected would be lost, so ranks tell each other.
"""

from collections.abc import Sequence

from torch import Tensor


class UsageTracker:
    """Notes each parameter whose gradient is accumulated, also under no_sync.

    Args:
        parameters: Those to watch.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._used: set[int] = set()
        # The hooks hold the set, not the tracker: a tracker dropped without `close` does not keep anything alive.
        self._handles = []
        for parameter in parameters:
            trains = parameter.requires_grad
            parameter.requires_grad_(True)  # torch registers on no other; a frozen parameter may be thawed later
            self._handles.append(
                parameter.register_post_accumulate_grad_hook(lambda p, used=self._used: used.add(id(p)))
            )
            parameter.requires_grad_(trains)

    def was_used(self, parameter: Tensor) -> bool:
        """Whether the backward pass reached the parameter since `clear`."""
        return id(parameter) in self._used

    def clear(self) -> None:
        """Begins the next step."""
        self._used.clear()

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
