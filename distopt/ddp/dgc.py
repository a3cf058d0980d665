"""Deep Gradient Compression: Lin, Han, Mao, Wang & Dally, ICLR 2018 (arXiv 1712.01887).

Per parameter and step: `u = m u + g; v += u`, send the k largest entries of v, forget them in v and (factor masking)
in u. The ranks' contributions are averaged, and the optimizer takes a plain SGD step with the average.

Limits: torch.optim.SGD without dampening or maximize; dense gradients; at most 2**31 - 1 entries per tensor.
"""

import dataclasses

from torch import Tensor

from distopt.config import check_choice, check_number, check_switch
from distopt.ddp.algorithm import CompressedAlgorithm
from distopt.ddp.memory import ErrorFeedback, Memory, MomentumCorrection
from distopt.ddp.parameters import Hyperparameters
from distopt.ddp.policy import StepPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGC(CompressedAlgorithm, name="dgc"):
    """Deep Gradient Compression with momentum correction; takes momentum and weight decay over from SGD.

    Raises:
        ConfigError: A value breaks its rule.

    Example:
        `att = distopt.DGC(density=1e-3).attach(ddp_model, optimizer)`
    """

    masking: bool = True  # sent entries lose their velocity: less staleness; off keeps every bit of momentum
    clip: float | None = None  # local clipping to norm clip * N**-0.5: smaller is gentler; needs all, so no overlap
    weight_decay: str = "momentum"  # decay with a dense momentum of its own; "local" puts it into the local gradient

    corrects_momentum = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("masking", self.masking)
        check_choice("weight_decay", self.weight_decay, ("momentum", "local"))
        if self.clip is not None:
            check_number(
                "clip",
                self.clip,
                rule="a positive number or None",
                remedy="use the norm that the whole gradient should not exceed, such as 1.0",
                low=0.0,
                high=float("inf"),
            )

    def step_policy(self, *, tracks_usage: bool) -> StepPolicy:
        """See `DDPAlgorithm.step_policy`."""
        return dataclasses.replace(super().step_policy(tracks_usage=tracks_usage), clip=self.clip)

    def memory_for(self, parameter: Tensor, whole: bool, hyperparameters: Hyperparameters) -> Memory:
        """See `DDPAlgorithm.memory_for`."""
        dtype = self.residual_dtype(parameter)
        residual = self.keeps_residual(parameter, whole)
        if hyperparameters.momentum == 0:  # u would only repeat the gradient
            return ErrorFeedback(parameter.numel(), dtype, parameter.device, residual=residual)
        return MomentumCorrection(
            parameter.numel(),
            dtype,
            parameter.device,
            momentum=hyperparameters.momentum,
            nesterov=hyperparameters.nesterov,
            masking=self.masking,
            residual=residual,
        )

    def decays_locally(self) -> bool:
        """See `DDPAlgorithm.decays_locally`."""
        return self.weight_decay == "local"
