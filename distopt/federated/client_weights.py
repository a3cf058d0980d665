"""How much clients count in a mean: by their samples, or all the same.

The weights of McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data* (FedAvg,
2017): `sample_weights`, n_k / sum n_k; or the same for all, `uniform_weights`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError


def sample_weights(num_samples: Sequence[int] | Tensor) -> Tensor:
    """FedAvg's n_k / sum n_k. A client without samples gets 0; all get 0 where nobody has any.

    Args:
        num_samples: m counts, the samples of each client that answered.

    Returns:
        (m,) float64.

    Raises:
        ConfigError: A count is not an integer of at least 0.
    """
    counts = torch.as_tensor(num_samples, device="cpu") if len(num_samples) else torch.empty(0, dtype=torch.int64)
    integral = not counts.is_floating_point() and counts.dtype != torch.bool
    if counts.dim() != 1 or not integral or (counts < 0).any():
        raise ConfigError(
            f"num_samples must be integers of at least 0, got {num_samples!r}; give how many samples each client "
            "trained on"
        )
    return counts.double() / max(int(counts.sum()), 1)


def uniform_weights(m: int) -> Tensor:
    """1/m for each of m clients, (m,) float64.

    Raises:
        ConfigError: m is not an integer of at least 0.
    """
    check_count("m", m, low=0, remedy="give how many clients are averaged")
    return torch.full((m,), 1.0 / max(m, 1), dtype=torch.float64)
