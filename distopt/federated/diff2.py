"""DIFF2: gradient descent along a private estimate that adds up gradient differences, which need less noise.

Murata & Suzuki, *DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex Distributed Learning*,
ICML 2023, 2302.03884, with gradient descent as its routine (DIFF2-GD); its equations are in `private_descent`.

Limits: the paper's other routine, BVR-L-SGD with noise, is not here.
"""

from dataclasses import dataclass

from distopt.config import check_count
from distopt.federated.checks import check_above_zero
from distopt.federated.privacy.private_descent import PrivateDescent


@dataclass(frozen=True, kw_only=True)
class DIFF2(PrivateDescent, name="diff2"):
    """See the module.

    Args:
        clip_difference: C2: a sample's gradient difference is clipped to C2 ||x_r - x_{r-1}||. Where the loss of each
            sample is L-smooth nothing is cut off from C2 = L on.
        interval: T, from one restart to the next; 1 is DP-GD.
        lr: See `PrivateDescent`, as all others.

    Raises:
        ConfigError: A value breaks its rule.
    """

    clip_difference: float = 1.0  # larger: less of the curvature is cut off, and more noise
    interval: int = 20  # longer: better restarts, and more noise that adds up between them

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "use 1.0, or the smoothness of the loss"
        check_above_zero("clip_difference", self.clip_difference, remedy=remedy)
        check_count("interval", self.interval, low=1, remedy="use 20; 1 is DP-GD")

    @property
    def restart_every(self) -> int:
        """See `PrivateDescent.restart_every`."""
        return self.interval

    @property
    def bound_of_differences(self) -> float:
        """See `PrivateDescent.bound_of_differences`."""
        return self.clip_difference
