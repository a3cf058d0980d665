"""The planner: schemes of all kinds, with many parameters, simulated on a trace; fastest first.

Which scheme wins depends on the trace and on the stop rule, so the choice is made by simulating the user's own trace,
as Krishnan, Ebrahimi & Khisti (ICLR 2023) do; no constant decides. The steps:

1. Coarse: every kind over its parameters, the number of stragglers in powers of two, on the first rounds of the trace.
2. Fine: around the best of each kind, numbers of stragglers in between.
3. Final: the best of all kinds, for all jobs, on the trace and on copies of it whose workers have changed places.

The copies are there because a trace shows a coincidence, two slow workers that hold the same part, once or never. A
scheme that such luck has favoured looks best on its trace and is not best on the next one; among other neighbours the
same slowness shows what it risks. Of schemes as fast as each other (`TIE`) the simplest comes first.

Limits: what the trace did not see, the plan does not know; record 100 rounds or more. Inner codes are 0/1 codes.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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
TIE = 0.005  # candidates within this part of the fastest count as equally fast

_COARSE_JOBS = 60
_FINE_PER_FAMILY = 4
_FINAL_PER_FAMILY, _FINAL = 3, 16
_COPIES = 6
_BURSTS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One scheme and what the simulation expects of it.

    Attributes:
        family: One of `FAMILIES`.
        scheme: Ready for `simulate` or `begin`.
        seconds: Of all jobs: the mean over the trace and its copies; inf if a run would have waited for ever.
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
    question = _Question(trace, jobs, stop, mu, seconds_per_load)
    n = trace.num_workers
    found = _rank(question.coarse(), {family: _coarse(family, n) for family in FAMILIES if family in families})
    found = {
        family: _rank(question.coarse(), {family: _around(schemes[:_FINE_PER_FAMILY], n)})[family]
        for family, schemes in found.items()
    }
    return _final(question, found, seed)


@dataclass(frozen=True)
class _Question:
    trace: Trace
    jobs: int
    stop: str
    mu: float
    seconds_per_load: float | None

    def coarse(self) -> "_Question":
        return replace(self, jobs=min(self.jobs, _COARSE_JOBS))

    def seconds(self, scheme: Scheme) -> float:
        """Of all jobs of this question."""
        return simulate(
            scheme,
            self.trace,
            jobs=self.jobs,
            stop=self.stop,
            mu=self.mu,
            seconds_per_load=self.seconds_per_load,
        ).seconds

    def copies(self, seed: int) -> Iterator["_Question"]:
        """The question itself, and with the workers in other places."""
        rng = np.random.default_rng(seed)
        yield self
        for _ in range(_COPIES):
            yield replace(self, trace=self.trace.reordered(rng.permutation(self.trace.num_workers)))


def _rank(question: _Question, by_family: dict[str, list[Scheme]]) -> dict[str, list[Scheme]]:
    """The schemes of each family, fastest first.

    By the time per round: the T rounds that a delay adds weigh less in a long run than in a short one.
    """

    def per_round(scheme: Scheme) -> float:
        return question.seconds(scheme) / (question.jobs + scheme.delay)

    return {family: sorted(schemes, key=per_round) for family, schemes in by_family.items()}


def _final(question: _Question, by_family: dict[str, list[Scheme]], seed: int) -> list[Candidate]:
    measured = [
        (question.seconds(scheme), family, scheme) for family, schemes in by_family.items() for scheme in schemes
    ]
    measured.sort(key=lambda each: each[0])
    best = [each for family in by_family for each in [m for m in measured if m[1] == family][:_FINAL_PER_FAMILY]]
    finalists = [each for place, each in enumerate(measured) if place < _FINAL or each in best]
    copies = list(question.copies(seed))
    uncoded = Uncoded(question.trace.num_workers)
    uncoded_s = float(np.mean([copy.seconds(uncoded) for copy in copies]))
    candidates = [
        Candidate(
            family=family,
            scheme=scheme,
            seconds=float(np.mean([copy.seconds(scheme) for copy in copies])),
            uncoded_s=uncoded_s,
            config=_config(scheme),
        )
        for _, family, scheme in finalists
        if family != "uncoded"
    ]
    candidates.append(
        Candidate(family="uncoded", scheme=uncoded, seconds=uncoded_s, uncoded_s=uncoded_s, config=_config(uncoded))
    )
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
