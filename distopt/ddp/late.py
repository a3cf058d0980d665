"""What of SGD happens only at the optimizer's step, in hosts that clip or cast updates on their way there.

DeepSpeed clips what the exchange has left in `p.grad`, and with bf16 copies it to master weights. Momentum SGD clips
the gradient, then adds weight decay, then momentum. So there a parameter that is sent whole brings only its averaged
gradient to the step, and decay (of the weights that the optimizer steps) and momentum are applied here: to the bit what
SGD does. Of a parameter that is sent sparse, momentum is in the update already, and only decay is left to do.
"""

from torch import Tensor

from distopt.ddp.memory import MomentumCorrection
from distopt.ddp.parameters import TrackedParameter, shaped_like


def step_late(entry: TrackedParameter, own: Tensor) -> None:
    """Makes the update of what the host has left in the gradient.

    Args:
        entry: The parameter.
        own: What the optimizer steps for it: the parameter itself or its master weights; with a gradient.
    """
    gradient, memory = own.grad, entry.memory
    if gradient is None:
        return
    if entry.late_decay:
        gradient.add_(own.detach(), alpha=entry.late_decay)
    if memory.pending and isinstance(memory, MomentumCorrection):
        memory.pending = False
        u = shaped_like(memory.u, entry.parameter)
        if memory.nesterov:
            u.add_(gradient).mul_(memory.momentum)
            gradient.add_(u)
        else:
            gradient.copy_(u.mul_(memory.momentum).add_(gradient))
    if entry.decay is not None and entry.late:
        buffer, rate = shaped_like(entry.decay.buffer, entry.parameter), entry.decay.rate
        if entry.decay.nesterov:
            buffer.add_(own.detach(), alpha=rate).mul_(entry.decay.momentum)
            gradient.add_(own.detach(), alpha=rate)
        else:
            buffer.mul_(entry.decay.momentum).add_(own.detach(), alpha=rate)
        gradient.add_(buffer)
