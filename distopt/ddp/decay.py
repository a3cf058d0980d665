"""Weight decay with its own momentum, identical on all ranks and outside the compression.

Decay that is added after decompression, without momentum, is not what momentum SGD does and costs accuracy; decay that
is added to the local gradient competes with it for the few entries sent. So decay keeps a dense momentum buffer d:
`d = m d + wd p` and the update gains d (Nesterov: `d = m (d + wd p)`, the update gains `d + wd p`).
"""

import torch
from torch import Tensor


class DecayMomentum:
    """Momentum of the weight decay of one parameter.

    Args:
        like: The parameter; the buffer lies in memory as it does.
        rate: The optimizer's weight_decay.
        momentum: m, in [0, 1).
        nesterov: Which form.
    """

    def __init__(self, like: Tensor, rate: float, momentum: float, nesterov: bool) -> None:
        self.rate = rate
        self.momentum = momentum
        self.nesterov = nesterov
        self.buffer = torch.zeros(
            like.numel(), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )

    @property
    def settings(self) -> tuple[float, float, bool]:
        """Rate, momentum and form: those with equal ones can be applied together."""
        return (self.rate, self.momentum, self.nesterov)
