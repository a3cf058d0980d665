"""A torch optimizer for many clients at once: their vectors as the rows of one parameter.

For an optimizer that treats each element by itself, and whose counters depend on the step alone, that is each client's
own optimizer to the bit. Clients with fewer steps leave early, so the rows that are still at work come first.
"""

import torch
from torch import Tensor, nn

from distopt.federated.local_training import LocalTraining, optimizer_class

# An optimizer that is not here may use norms, matrices, or the order of parameters.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


def is_elementwise(name: str) -> bool:
    """Whether the optimizer of that name is known to treat each element by itself."""
    return optimizer_class(name) in ELEMENTWISE


class StackedOptimizer:
    """The local optimizers of the clients of a round.

    Args:
        local: Which optimizer.
        points: (num_clients, d), stepped in place.
        round: Which one.
    """

    def __init__(self, local: LocalTraining, points: Tensor, round: int) -> None:
        self._points = points
        self._parameter = nn.Parameter(points)
        self._optimizer = local.make([self._parameter], round)

    @property
    def lr(self) -> float:
        """Of the coming step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, gradient: Tensor) -> None:
        """One step of the first `len(gradient)` clients; the others never step again."""
        if len(gradient) < len(self._parameter):
            self._keep_first(len(gradient))
        self._parameter.grad = gradient
        self._optimizer.step()

    def _keep_first(self, count: int) -> None:
        kept = nn.Parameter(self._points[:count])
        state = self._optimizer.state.pop(self._parameter, {})
        self._optimizer.state[kept] = {
            name: value[:count] if isinstance(value, Tensor) and value.shape == self._parameter.shape else value
            for name, value in state.items()
        }
        self._optimizer.param_groups[0]["params"] = [kept]
        self._parameter = kept
