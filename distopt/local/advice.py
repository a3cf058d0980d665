"""What to set for a link: the fewest local steps with which ranks compute for most of the time.

In a round of H inner steps of t seconds each, P fragments are exchanged. Each takes E seconds, during which o steps may
be taken, and W seconds of work come to that which nothing hides (selecting, encoding, decoding, the outer step):

    seconds of a round = H t + W + P max(0, E - o t),     compute share = H t / seconds of a round

E is `Link.allgather_s` of what a rank contributes, or `Link.allreduce_s` where contributions are added up. The fewer
steps the ranks are apart, the nearer they stay to one training. So of all H and o that reach the share, those with the
least H + o are taken: the steps from the model that all had to the one in which a rank takes in the others' work.

Limits: one number for all pairs of ranks; that ranks wait for a slower one is not foreseen, nor is others' traffic.
"""

import dataclasses
import math
from collections.abc import Sequence

from distopt.comm import Link
from distopt.compress import INDEX_FORMATS, VALUE_FORMATS
from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.local.configuration import LocalSteps, SparseLoCo

MOST_INNER_STEPS = 500  # as many as in the paper of DiLoCo, arXiv:2311.08105


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one way to train costs on a link.

    Attributes:
        name: Of the way.
        algorithm: With `inner_steps` and `overlap` set; None for a way that exchanges gradients in every step.
        inner_steps: From one exchange to the next.
        overlap: Inner steps that an exchange may take.
        link_bytes: What each rank puts on the link for one exchange.
        exchange_s: Seconds of one exchange, hidden or not.
        compute_share: Part of the time in which ranks compute, in (0, 1].
        step_s: Seconds per inner step, with its part of the exchange.
        reaches: Whether the compute share is the one asked for.
    """

    name: str
    algorithm: LocalSteps | None = None
    inner_steps: int = 1
    overlap: int = 0
    link_bytes: float
    exchange_s: float
    compute_share: float
    step_s: float
    reaches: bool

    @property
    def steps_apart(self) -> int:
        """Steps from the model that all had to the one in which a rank takes in the others' work: H + o."""
        return self.inner_steps + self.overlap


def every_step(name: str, *, exchange_s: float, link_bytes: float, step_seconds: float, share: float = 0.95) -> Plan:
    """A way that exchanges in every step, such as dense DDP or DGC, for comparison.

    Args:
        name: Of the way.
        exchange_s: Seconds of one exchange; none of it is taken to be hidden.
        link_bytes: That each rank puts on the link.
        step_seconds: Of one step without any exchange.
        share: Of the time, to be spent computing.

    Raises:
        ConfigError: A value breaks its rule.
    """
    check_goal(step_seconds, share)
    found = step_seconds / (step_seconds + exchange_s)
    return Plan(
        name=name,
        link_bytes=link_bytes,
        exchange_s=exchange_s,
        compute_share=found,
        step_s=step_seconds + exchange_s,
        reaches=found >= share,
    )


def plan(
    algorithm: LocalSteps,
    link: Link,
    *,
    num_ranks: int,
    parameters: int,
    step_seconds: float,
    share: float = 0.95,
    work_seconds: float = 0.0,
) -> Plan:
    """The algorithm with the least `inner_steps + overlap` for which ranks compute that share of the time.

    Args:
        algorithm: Its other settings are kept.
        link: Between the ranks.
        num_ranks: At least two.
        parameters: Of the model.
        step_seconds: Of one inner step without any exchange.
        share: Of the time, in (0, 1), to be spent computing.
        work_seconds: Of all exchanges of a round, which no overlap hides.

    Returns:
        With `reaches` False where not even 500 inner steps suffice; then it has these.

    Raises:
        ConfigError: A value breaks its rule.
    """
    _check(num_ranks, parameters, step_seconds, share)
    part_s = _part_s(algorithm, link, num_ranks, parameters)
    inner_steps, overlap = _Round(step_seconds, part_s, algorithm.fragments, work_seconds).least(share)
    return forecast(
        dataclasses.replace(algorithm, inner_steps=inner_steps, overlap=overlap),
        link,
        num_ranks=num_ranks,
        parameters=parameters,
        step_seconds=step_seconds,
        share=share,
        work_seconds=work_seconds,
    )


def forecast(
    algorithm: LocalSteps,
    link: Link,
    *,
    num_ranks: int,
    parameters: int,
    step_seconds: float,
    share: float = 0.95,
    work_seconds: float = 0.0,
) -> Plan:
    """What the algorithm costs as it is set; see `plan` for the arguments and errors."""
    _check(num_ranks, parameters, step_seconds, share)
    part_s = _part_s(algorithm, link, num_ranks, parameters)
    found = _Round(step_seconds, part_s, algorithm.fragments, work_seconds).share(
        algorithm.inner_steps, algorithm.overlap
    )
    messages = num_ranks - 1 if isinstance(algorithm, SparseLoCo) else 2 * (num_ranks - 1) / num_ranks
    return Plan(
        name=algorithm.name,
        algorithm=algorithm,
        inner_steps=algorithm.inner_steps,
        overlap=algorithm.overlap,
        link_bytes=messages * contribution_bytes(algorithm, parameters),
        exchange_s=part_s * algorithm.fragments,
        compute_share=found,
        step_s=step_seconds / found,
        reaches=found >= share,
    )


def choose(plans: Sequence[Plan]) -> Plan:
    """The plan to take: that which changes the training least among those that reach the share.

    That is the first one with an exchange in every step, else the one with the fewest steps apart, the first if two are
    alike. If none reaches it, the one with the largest compute share.

    Raises:
        ConfigError: There is none.
    """
    if not plans:
        raise ConfigError("plans must be one or more, got none; make them by `plan` and `every_step`")
    if enough := [each for each in plans if each.reaches]:
        return min(enough, key=lambda each: each.steps_apart if each.algorithm is not None else 0)
    return max(plans, key=lambda each: each.compute_share)


def contribution_bytes(algorithm: LocalSteps, parameters: int) -> float:
    """Bytes that a rank contributes to the exchanges of a round, were the model one tensor of whole chunks.

    Tensors that end within a chunk, and headers of four bytes, add a little.
    """
    if not isinstance(algorithm, SparseLoCo):
        return 4.0 * parameters
    chunk, count = algorithm.chunk, algorithm.k
    rows = math.ceil(parameters / chunk)
    sections = INDEX_FORMATS[algorithm.indices].sections(chunk, count)
    positions = sum(dtype.itemsize * length for dtype, length in sections)
    return float(rows * positions + VALUE_FORMATS[algorithm.values].nbytes([rows], count))


def _part_s(algorithm: LocalSteps, link: Link, num_ranks: int, parameters: int) -> float:
    """Seconds of the exchange of one fragment."""
    part = contribution_bytes(algorithm, parameters) / algorithm.fragments
    sparse = isinstance(algorithm, SparseLoCo)
    return link.allgather_s(num_ranks, part) if sparse else link.allreduce_s(num_ranks, part)


@dataclasses.dataclass(frozen=True)
class _Round:
    """t, E, P and W of the module's equation."""

    step_s: float
    part_s: float
    fragments: int
    work_s: float

    def share(self, inner_steps: int, overlap: int) -> float:
        computing = inner_steps * self.step_s
        return computing / (computing + self._not_hidden(overlap))

    def _not_hidden(self, overlap: int) -> float:
        return self.work_s + self.fragments * max(0.0, self.part_s - overlap * self.step_s)

    def least(self, share: float) -> tuple[int, int]:
        """H and o of least sum, of two with the same sum those with the shorter overlap."""
        fully_hidden = math.ceil(min(self.part_s / self.step_s, MOST_INNER_STEPS))
        candidates = [self._with(overlap, share) for overlap in range(min(fully_hidden, MOST_INNER_STEPS - 1) + 1)]
        possible = [each for each in candidates if each[0] <= MOST_INNER_STEPS]
        if possible:
            return min(possible, key=sum)
        return MOST_INNER_STEPS, max(range(len(candidates)), key=lambda o: (self.share(MOST_INNER_STEPS, o), -o))

    def _with(self, overlap: int, share: float) -> tuple[int, int]:
        """The least H for an overlap."""
        enough = share / (1 - share) * self._not_hidden(overlap) / self.step_s
        least = max(1, overlap + 1, self.fragments)
        if overlap:  # what is sent must be through before the link is needed again
            least = max(least, math.ceil(min(self.fragments * self.part_s / self.step_s, 2 * MOST_INNER_STEPS)))
        inner_steps = max(least, math.ceil(min(enough, 2 * MOST_INNER_STEPS)))
        return inner_steps + (self.share(inner_steps, overlap) < share), overlap  # one more where rounding was short


def _check(num_ranks: int, parameters: int, step_seconds: float, share: float) -> None:
    check_count("num_ranks", num_ranks, low=2, remedy="use the number of hosts that take part")
    check_count("parameters", parameters, low=1, remedy="use the number of parameters of the model")
    check_goal(step_seconds, share)


def check_goal(step_seconds: float, share: float) -> None:
    """Raises `ConfigError` unless a step takes some time, of which ranks can compute for this share."""
    remedy = "use what a step takes without any exchange"
    check_number("step_seconds", step_seconds, rule="positive seconds", remedy=remedy, low=0.0, high=math.inf)
    if not (isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < 1):
        raise ConfigError(f"share must be a number in (0, 1), got {share!r}; use 0.95 to compute for 95% of the time")
