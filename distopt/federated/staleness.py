"""Weights for servers that do not wait: what a client's delta counts, given how often it arrives and how old it is.

    x^{n+1} = x^n + eta_g * sum_i omega_i(n) * (x_i - x^{version that client i was sent})

The rules below choose omega so that its average over the aggregations is the client's importance p_i, however slow the
client is: the objective stays sum_i p_i F_i. tau_i is the time client i takes for one reply.

| scheme | aggregates | weight |
|---|---|---|
| synchronous | when all have answered | p_i |
| asynchronous FedAvg | at each arrival | (sum_j 1/tau_j) tau_i p_i |
| FedFix | every Dt, whoever has arrived | ceil(tau_i/Dt) p_i |
| FedBuff | at every c-th arrival | p_i / (share of the aggregations that client i is in) |

Sources: Fraboni et al., *A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients
Updates*, JMLR 2023, 2206.10189 (the weights, FedFix); Nguyen et al., *Federated Learning with Buffered Asynchronous
Aggregation* (FedBuff), 2106.06639 (the discount).

Limits: the times and shares must be known, and constant or averages. Where they are not, `ParticipationWeights` counts
the rounds from one arrival of a client to the next, which for FedFix is what ceil(tau_i/Dt) stands for. The discount of
old deltas is for stability; it takes weight from slow clients, so it is not unbiased.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.errors import ConfigError
from distopt.federated.checks import check_shares, float_vector

Vector = Sequence[float] | Tensor

# A quotient tau/Dt this near to an integer, relatively, is that integer: 0.3/0.1 and 0.6/0.2 are not 3 in floating
# point, and a clock reads 3.0000000004 for 3. It is a million times the rounding errors, a nanosecond in a second.
_WHOLE = 1e-9


def synchronous_weights(importances: Vector) -> Tensor:
    """p_i, for a server that waits for all.

    Args:
        importances: (m,) p, at least 0, their sum 1: see `uniform_weights` and `sample_weights`.

    Returns:
        (m,) float64.

    Raises:
        ConfigError: The importances break their rule.
    """
    shares = float_vector("importances", importances, remedy="use uniform_weights or sample_weights")
    check_shares("importances", shares)
    return shares.clone()


def async_fedavg_weights(times_s: Vector, importances: Vector) -> Tensor:
    """(sum_j 1/tau_j) tau_i p_i, for a server that aggregates each delta when it arrives.

    Args:
        times_s: (m,) tau, seconds per reply, of all clients that take part.
        importances: (m,) p, at least 0, their sum 1.

    Returns:
        (m,) float64: client i counts this much at each of its arrivals.

    Raises:
        ConfigError: A value breaks its rule.
    """
    shares = synchronous_weights(importances)
    times = _times(times_s, shares)
    return (1.0 / times).sum() * times * shares


def fedfix_rounds(times_s: Vector, window_s: float) -> Tensor:
    """ceil(tau_i/Dt): how many rounds of the length Dt client i needs for a reply, (m,) int64, at least 1.

    A quotient that differs from an integer by at most 1e-9 of it counts as that integer.

    Raises:
        ConfigError: A time or the window is not a finite number above 0.
    """
    times = float_vector("times_s", times_s, remedy="give seconds per reply", positive=True)
    remedy = "give the seconds between aggregations"
    check_number("window_s", window_s, rule="a finite number above 0", remedy=remedy, low=0.0, high=math.inf)
    quotients = times / window_s
    nearest = quotients.round()
    whole = (quotients - nearest).abs() <= _WHOLE * nearest
    return torch.where(whole, nearest, quotients.ceil()).long().clamp_(min=1)


def fedfix_weights(times_s: Vector, window_s: float, importances: Vector) -> Tensor:
    """ceil(tau_i/Dt) p_i, for a server that aggregates every Dt; p_i, as FedAvg, where Dt is as long as all times.

    Args:
        times_s: (m,) tau, seconds per reply. A client begins at the round's start, also where it was ready before.
        window_s: Dt, seconds between aggregations.
        importances: (m,) p, at least 0, their sum 1.

    Returns:
        (m,) float64: client i counts this much in each round in which it arrives.

    Raises:
        ConfigError: A value breaks its rule.
    """
    shares = synchronous_weights(importances)
    _times(times_s, shares)
    return fedfix_rounds(times_s, window_s) * shares


def fedbuff_weights(participation: Vector, importances: Vector) -> Tensor:
    """p_i / q_i, for a server that aggregates whenever enough deltas have arrived.

    Args:
        participation: (m,) q, in (0, 1]: the share of the aggregations that client i is in, measured or simulated.
        importances: (m,) p, at least 0, their sum 1.

    Returns:
        (m,) float64: client i counts this much in each aggregation it is in.

    Raises:
        ConfigError: A value breaks its rule.
    """
    shares = synchronous_weights(importances)
    rates = float_vector("participation", participation, remedy="leave out who never arrives", positive=True)
    _check_length("participation", rates, shares)
    if (rates > 1).any():
        raise ConfigError(
            f"participation must be in (0, 1], got {float(rates.max())}; divide the number of aggregations with the "
            "client by the number of all"
        )
    return shares / rates


def polynomial_discount(staleness: Vector, exponent: float = 0.5) -> Tensor:
    """(1 + staleness)^-exponent, (m,) float64: 1 for a delta against the current version.

    Args:
        staleness: (m,) how many versions the server has moved on since the client was sent its own.
        exponent: Higher: old deltas count less; 0: not less at all.

    Raises:
        ConfigError: A staleness or the exponent is below 0 or not finite.
    """
    remedy = "give the current version minus the one the client was sent"
    versions = float_vector("staleness", staleness, remedy=remedy)
    if (versions < 0).any():
        raise ConfigError(f"staleness must be at least 0, got {float(versions.min())}; {remedy}")
    if exponent != 0:
        rule = "a finite number of at least 0"
        check_number("exponent", exponent, rule=rule, remedy="use 0.5", low=0.0, high=math.inf)
    return (1.0 + versions) ** -exponent


def _times(times_s: Vector, shares: Tensor) -> Tensor:
    times = float_vector("times_s", times_s, remedy="give seconds per reply", positive=True)
    _check_length("times_s", times, shares)
    return times


def _check_length(field: str, vector: Tensor, shares: Tensor) -> None:
    if len(vector) != len(shares):
        raise ConfigError(f"{field} must have one value per client, got {len(vector)} for {len(shares)} importances")
