"""DP-GD: gradient descent with clipped gradients and noise; DIFF2 in which every round is a restart."""

from dataclasses import dataclass

from distopt.federated.privacy.private_descent import PrivateDescent


@dataclass(frozen=True, kw_only=True)
class DPGD(PrivateDescent, name="dp-gd"):
    """`x - eta (mean_p mean_j clip(grad l_j(x), C) + N(0, (C s)^2 I))`; see `PrivateDescent`."""

    @property
    def restart_every(self) -> int:
        """See `PrivateDescent.restart_every`."""
        return 1

    @property
    def bound_of_differences(self) -> float:
        """There are none."""
        return 0.0
