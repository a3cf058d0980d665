"""Top-k with error feedback: what is not sent is added to the next gradient (Stich et al., NeurIPS 2018, 1809.07599).

Works with every optimizer: the optimizer sees the averaged sparse gradient and keeps its own momentum and moments.

Limits: momentum acts on late gradients (that is what `distopt.DGC` corrects for SGD); dense gradients only.
"""

import dataclasses

from torch import Tensor

from distopt.ddp.algorithm import CompressedAlgorithm
from distopt.ddp.memory import ErrorFeedback, Memory
from distopt.ddp.parameters import Hyperparameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(CompressedAlgorithm, name="topk"):
    """Plain error feedback for any optimizer: `e += g`, send the k largest entries of e, keep the rest.

    Raises:
        ConfigError: A value breaks its rule.

    Example:
        `att = distopt.TopK(density=1e-2).attach(ddp_model, torch.optim.AdamW(ddp_model.parameters()))`
    """

    def memory_for(self, parameter: Tensor, whole: bool, hyperparameters: Hyperparameters) -> Memory:
        """See `DDPAlgorithm.memory_for`."""
        residual = self.keeps_residual(parameter, whole)
        return ErrorFeedback(parameter.numel(), self.residual_dtype(parameter), parameter.device, residual=residual)
