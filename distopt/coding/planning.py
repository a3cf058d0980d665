"""The planner: schemes of all kinds, with many parameters, simulated on a trace; fastest first.

Which scheme wins depends on the trace and on the stop rule, so the choice is made by simulating the user's own trace,
as Krishnan, Ebrahimi & Khisti (ICLR 2023) do; no constant decides.

Workers that are slow in all rounds get places far apart first. Then:

1. Coarse: every kind over its parameters, the number of stragglers in powers of two, on the first rounds of the trace.
2. Fine: around the best of each kind, numbers of stragglers in between.
3. Final: the best of all kinds, on the whole trace and on copies of it whose workers have changed places; if they are
   slow independently of each other, also with the rounds of each begun at another one.

The copies are there because a trace shows a coincidence, two workers slow at once, once or never. A scheme that such
luck has favoured looks best on its trace and is not best on the next one; the same slowness at other places and times
shows what it risks, and each worker's own bursts stay as they were. Of schemes as fast as each other (`TIE`) the
simplest comes first.

Limits: what the trace did not see, the plan does not know: record 100 rounds or more, and 300 where a few answers are
extremely late. Inner codes are 0/1 codes. Places on nodes are not known: the copies stand for any.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.coding.msgc import MSGC
from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.repetition import binary, fractional
from distopt.coding.scheme import Scheme
from distopt.coding.sequential import SequentialCode
from distopt.coding.simulation import simulate
from distopt.coding.srsgc import SRSGC
from distopt.coding.trace import Trace
from distopt.config import check_count
from distopt.errors import ConfigError

FAMILIES = ("uncoded", "gradient-coding", "sr-sgc", "m-sgc")
TIE = 0.002  # candidates within this part of the fastest count as equally fast

_COARSE_JOBS = 80  # long enough that a delay of a few rounds does not decide
_COARSE_BEST, _FINE_BEST = 16, 24  # of each family, that go on to the next step
_HOPELESS = 1.25  # slower than the best by so much, if only by its load: not simulated
_FINAL, _FINAL_PER_FAMILY = 32, 3
_COPIES = 12
_SURE_AFTER, _BEHIND = 2, 0.04  # copies after which a scheme that is so far behind in all of them is out
_BURSTS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One scheme and what the simulation expects of it.

    Attributes:
        family: One of `FAMILIES`.
        scheme: Ready for `simulate` or `begin`.
        seconds: Of all jobs: the mean over the trace and copies of it; inf if a run would have waited for ever.
        uncoded_s: The same without coding.
        config: What to give `distopt.from_config` for live training.
    """

    family: str
    scheme: Scheme
    seconds: float
    uncoded_s: float
    config: dict[str, Any]

    @property
    def ratio(self) -> float:
        """`seconds` over those without coding; NaN if both are infinite."""
        return self.seconds / self.uncoded_s if math.isfinite(self.seconds + self.uncoded_s) else _of_infinite(self)

    @property
    def parameters(self) -> dict[str, int]:
        """The scheme's parameters by name, without the number of workers."""
        if isinstance(self.scheme, SequentialCode):
            return {name: getattr(self.scheme, name) for name in ("burst", "window", "stragglers")}
        return {"stragglers": self.scheme.code.tolerance} if isinstance(self.scheme, OneRound) else {}


def plan(
    trace: Trace,
    *,
    jobs: int | None = None,
    stop: str = "decodable",
    mu: float = 1.0,
    seconds_per_load: float | None = None,
    families: Collection[str] = FAMILIES,
    seed: int = 0,
) -> list[Candidate]:
    """Which scheme to train with, fastest first; the best of each family are among them, and uncoded always is.

    Args:
        trace: What the workers take.
        jobs: How many gradients to compute; None for as many as the trace has rounds.
        stop: As in `simulate`.
        mu: As in `simulate`.
        seconds_per_load: In place of the trace's slope.
        families: Some of `FAMILIES`; those with delay 0 are "uncoded" and "gradient-coding".
        seed: Of the places in the copies.

    Raises:
        ConfigError: A value breaks its rule.
    """
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ConfigError(f"families must be some of {', '.join(FAMILIES)}, got {', '.join(map(repr, unknown))}")
    jobs = trace.num_rounds if jobs is None else jobs
    check_count("jobs", jobs, low=1, remedy="give the number of gradients to compute")
    question = _Question(trace.reordered(_spread(trace)), jobs, stop, mu, seconds_per_load)
    n = trace.num_workers
    found: dict[str, list[Scheme]] = {}
    for family in FAMILIES:
        if family in families:
            coarse = _fastest(question, _coarse(family, n), _COARSE_BEST)
            found[family] = _fastest(question, _around(coarse, n), _FINE_BEST)
    return _candidates(question, _finalists(question, found), seed)


@dataclass(frozen=True)
class _Question:
    trace: Trace
    jobs: int
    stop: str
    mu: float
    seconds_per_load: float | None

    def seconds(self, scheme: Scheme, most_jobs: int | None = None) -> float:
        """Of all jobs; extrapolated from the first `most_jobs`, by default from as many as the trace has rounds.

        The rest would only repeat the trace. The T rounds that a delay adds are counted as the whole run has them.
        """
        jobs = min(self.jobs, most_jobs or self.trace.num_rounds)
        found = simulate(
            scheme, self.trace, jobs=jobs, stop=self.stop, mu=self.mu, seconds_per_load=self.seconds_per_load
        )
        return found.seconds * (self.jobs + scheme.delay) / (jobs + scheme.delay)

    def floor(self, scheme: Scheme) -> float:
        """Of all jobs if each round took its fastest answer, at the scheme's mean load."""
        slope = self.trace.slope if self.seconds_per_load is None else self.seconds_per_load
        fastest = np.nan_to_num(self.trace.seconds, nan=math.inf).min(axis=1)
        shifted = fastest[np.isfinite(fastest)] + slope * (scheme.load - self.trace.load)
        return self.jobs * max(0.0, float(shifted.mean()))

    def copies(self, seed: int) -> Iterator["_Question"]:
        """The question itself, and with the workers at any places, and if they are independent at other times."""
        rng = np.random.default_rng(seed)
        yield self
        independent = _independent(self.trace)
        for _ in range(_COPIES):
            copy = self.trace.reordered(rng.permutation(self.trace.num_workers))
            if independent:
                copy = copy.shifted(rng.integers(self.trace.num_rounds, size=self.trace.num_workers))
            yield replace(self, trace=copy)


def _spread(trace: Trace) -> NDArray[np.int64]:
    """(workers,): who gets each place, so that those that are slow in all rounds are far apart.

    In one group of a code they would count as its fault. Steps of the golden ratio of a circle keep any number of
    points apart.
    """
    n = trace.num_workers
    mean = np.nan_to_num(trace.seconds, nan=math.inf).mean(axis=0)
    places = np.argsort(np.arange(n) * (5**0.5 - 1) / 2 % 1, kind="stable")
    order: NDArray[np.int64] = np.argsort(-mean, kind="stable")[places]
    return order


def _independent(trace: Trace) -> bool:
    """Whether one worker's slowness says nothing about another's in the same round.

    Then the mean over n workers varies from round to round n times less than a worker does; the factor of 2 is for
    chance. What a worker is slower than others in all rounds does not count.
    """
    slower = trace.seconds - np.nanmean(trace.seconds, axis=0, where=np.isfinite(trace.seconds))
    if not np.isfinite(slower).all():
        return False  # a worker that stops answering does so at a certain moment
    return float(slower.mean(axis=1).var()) <= 2 * float(slower.var()) / trace.num_workers


def _fastest(question: _Question, schemes: Iterable[Scheme], count: int) -> list[Scheme]:
    """The first `count` on the first rounds of the trace; without those whose load alone makes them slow."""
    found: list[tuple[float, int, Scheme]] = []
    best = math.inf
    floors = [(question.floor(scheme), place, scheme) for place, scheme in enumerate(schemes)]
    for floor, place, scheme in sorted(floors, key=lambda each: each[:2]):
        if floor <= _HOPELESS * best:
            seconds = question.seconds(scheme, _COARSE_JOBS)
            best = min(best, seconds)
            found.append((seconds, place, scheme))
    return [scheme for _, _, scheme in sorted(found, key=lambda each: each[:2])[:count]]


def _finalists(question: _Question, by_family: dict[str, list[Scheme]]) -> dict[str, list[Scheme]]:
    """The best on the whole trace, and the best of each family."""
    measured = {
        family: sorted(((question.seconds(scheme), place) for place, scheme in enumerate(schemes)))
        for family, schemes in by_family.items()
    }
    limit = sorted(seconds for found in measured.values() for seconds, _ in found)[:_FINAL][-1]
    return {
        family: [
            by_family[family][place]
            for rank, (seconds, place) in enumerate(found)
            if seconds <= limit or rank < _FINAL_PER_FAMILY
        ]
        for family, found in measured.items()
    }


def _means(question: _Question, schemes: list[Scheme], seed: int) -> list[float]:
    """The mean seconds of each over the trace and its copies; who always falls behind is not asked for all copies.

    Always, because one bad place, two slow workers in one group, says little about the others.
    """
    seconds: list[list[float]] = [[] for _ in schemes]
    running = set(range(len(schemes)))
    for number, copy in enumerate(question.copies(seed)):
        for place in running:
            seconds[place].append(copy.seconds(schemes[place]))
        if number >= _SURE_AFTER:
            best = min(float(np.mean(seconds[place])) for place in running)
            running = {place for place in running if min(seconds[place]) <= (1 + _BEHIND) * best}
    return [float(np.mean(each)) for each in seconds]


def _candidates(question: _Question, by_family: dict[str, list[Scheme]], seed: int) -> list[Candidate]:
    """Fastest first; of those that are tied with the fastest, the simplest."""
    uncoded = Uncoded(question.trace.num_workers)
    pairs = [(family, scheme) for family, schemes in by_family.items() for scheme in schemes if family != "uncoded"]
    pairs.append(("uncoded", uncoded))
    means = _means(question, [scheme for _, scheme in pairs], seed)
    candidates = [
        Candidate(family=family, scheme=scheme, seconds=mean, uncoded_s=means[-1], config=_config(scheme))
        for (family, scheme), mean in zip(pairs, means, strict=True)
    ]
    candidates.sort(key=lambda each: each.seconds)
    tied = [each for each in candidates if each.seconds <= (1 + TIE) * candidates[0].seconds]
    tied.sort(key=lambda each: (each.scheme.delay, each.scheme.load))
    return tied + candidates[len(tied) :]


def _coarse(family: str, n: int) -> list[Scheme]:
    """A family over its parameters, the stragglers in powers of two."""
    counts = sorted({min(2**power, n) for power in range(n.bit_length() + 1)} | {n - 1, n} - {0})
    if family == "uncoded":
        return [Uncoded(n)]
    if family == "gradient-coding":
        divisors = [copies - 1 for copies in range(2, n // 2 + 1) if n % copies == 0]
        return [_code(n, s) for s in sorted({*divisors, *(s for s in counts if s < n)})]
    made: list[Scheme] = []
    for burst in _BURSTS:
        for longer in range(1, 6):
            for count in counts:
                if family == "m-sgc":
                    made.append(MSGC(n=n, burst=burst, window=burst + longer, stragglers=count))
                elif longer <= 3 and count < n:
                    made.append(SRSGC(n=n, burst=burst, window=burst * longer + 1, stragglers=count))
    return made


def _around(schemes: Iterable[Scheme], n: int) -> list[Scheme]:
    """These, and the same with numbers of stragglers half a step away."""
    made: list[Scheme] = []
    for scheme in schemes:
        made.append(scheme)
        if isinstance(scheme, SequentialCode):
            most = n - isinstance(scheme, SRSGC)
            counts = [count for count in _half_steps(scheme.stragglers) if 1 <= count <= most]
            made += [replace(scheme, stragglers=count) for count in counts]
        elif isinstance(scheme, OneRound):
            made += [_code(n, s) for s in _half_steps(scheme.code.tolerance) if 1 <= s < n]
    return list({repr(scheme): scheme for scheme in made}.values())


def _half_steps(count: int) -> tuple[int, ...]:
    return (round(count * 2**-0.5), count - 1, count + 1, round(count * 2**0.5))


def _code(n: int, s: int) -> OneRound:
    return OneRound(fractional(n, s) if n % (s + 1) == 0 else binary(n, s))


def _config(scheme: Scheme) -> dict[str, Any]:
    """What a live run is configured with; the number of workers is the job's."""
    plain = scheme.to_dict()
    if not isinstance(scheme, SequentialCode):
        return {"algorithm": "gradient-coding", **plain}
    inner = {key: value for key, value in plain.items() if key != "n" and (key, value) != ("code", "binary")}
    return {"algorithm": "gradient-coding", "scheme": inner}


def _of_infinite(candidate: Candidate) -> float:
    if math.isfinite(candidate.seconds):
        return 0.0
    return math.inf if math.isfinite(candidate.uncoded_s) else math.nan
