"""A scheme on a trace: how long its rounds would have taken.

`simulate` computes all workers at once; `replay` is the obvious version, which feeds a `Run` one answer after the other
and asks a `StopRule` after each, as live training does.

Round r takes the times of the trace's round r, shifted to each worker's load in that round. A trace that is shorter
than the run starts again from its beginning.

Limits: the time of the master and of the network beyond what the trace holds is not counted; an answer that comes after
the end of its round is lost, and its worker starts the next round with the others.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distopt.coding.code import Code
from distopt.coding.one_round import OneRound
from distopt.coding.round_times import RoundTimes, round_times
from distopt.coding.scheme import Scheme, Task
from distopt.coding.stopping import stop_rule
from distopt.coding.trace import Trace, check_slope
from distopt.config import check_count
from distopt.errors import ConfigError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Simulated:
    """What a simulation found.

    Attributes:
        scheme: What was simulated.
        jobs: How many gradients were computed.
        per_round: (rounds,) float64 seconds; inf from a round on that would have waited for ever.
        straggled: (workers, rounds) bool: who had not answered at the end of the round.
        repeated: How often the trace was begun again because it was shorter than the run.
    """

    scheme: Scheme
    jobs: int
    per_round: FloatArray
    straggled: NDArray[np.bool_]
    repeated: int

    @property
    def seconds(self) -> float:
        """Of the whole run; inf if a round would have waited for ever."""
        return float(self.per_round.sum())

    @property
    def seconds_per_job(self) -> float:
        """Seconds of the whole run, its rounds of starting and ending included, over its jobs."""
        return self.seconds / self.jobs

    @property
    def stragglers(self) -> NDArray[np.int64]:
        """(rounds,): how many had not answered at the end of each round."""
        counts: NDArray[np.int64] = self.straggled.sum(axis=0)
        return counts


def simulate(
    scheme: Scheme | Code,
    trace: Trace,
    *,
    jobs: int | None = None,
    stop: str = "decodable",
    mu: float = 1.0,
    seconds_per_load: float | None = None,
) -> Simulated:
    """Simulates a scheme, or a gradient code with one job per round.

    Args:
        scheme: For as many workers as the trace has.
        trace: What the workers take.
        jobs: Number of gradients; None for as many as the trace has rounds.
        stop: One of `STOP_RULES`.
        mu: For the rules "paper" and "minimal": how many times the fastest answer to wait beyond it.
        seconds_per_load: In place of the trace's slope.

    Raises:
        ConfigError: The workers differ in number, or a value breaks its rule.
    """
    scheme, jobs, slope = _question(scheme, trace, jobs, seconds_per_load)
    stop_rule(stop, mu=mu)  # checks both
    times_of = round_times(scheme, jobs)
    if times_of is None:
        return replay(scheme, trace, jobs=jobs, stop=stop, mu=mu, seconds_per_load=slope)
    num_rounds = jobs + scheme.delay
    per_round, straggled = _empty(scheme, num_rounds)
    for round in range(num_rounds):
        times = _times(trace, round, times_of.start(round), slope)
        end = _end(times_of, times, stop, mu)
        arrived = (times <= end) & (times < math.inf)
        per_round[round], straggled[:, round] = end, ~arrived
        if end == math.inf:
            break
        times_of.end(arrived)
    return _simulated(scheme, jobs, per_round, straggled, trace)


def replay(
    scheme: Scheme | Code,
    trace: Trace,
    *,
    jobs: int | None = None,
    stop: str = "decodable",
    mu: float = 1.0,
    seconds_per_load: float | None = None,
) -> Simulated:
    """As `simulate`, answer by answer: the reference, and for schemes of your own."""
    scheme, jobs, slope = _question(scheme, trace, jobs, seconds_per_load)
    run, rule = scheme.begin(jobs), stop_rule(stop, mu=mu)
    per_round, straggled = _empty(scheme, run.num_rounds)
    for round in range(run.num_rounds):
        times = _times(trace, round, _loads(run.tasks(round), scheme.chunks), slope)
        first = float(times[times > -math.inf].min(initial=math.inf))
        check = rule.next_check_s(first)
        moments = {0.0, *times[np.isfinite(times)].tolist(), *([check] if check is not None else [])}
        for moment in sorted(moments):
            for worker in np.flatnonzero(times == moment).tolist():
                run.record(round, worker)
            if rule.ends(run, round, moment, first):
                per_round[round] = moment
                break
        straggled[run.missing(round), round] = True
        if per_round[round] == math.inf:
            break
    return _simulated(scheme, jobs, per_round, straggled, trace)


def _question(
    scheme: Scheme | Code, trace: Trace, jobs: int | None, seconds_per_load: float | None
) -> tuple[Scheme, int, float]:
    made = OneRound(scheme) if isinstance(scheme, Code) else scheme
    if made.num_workers != trace.num_workers:
        raise ConfigError(
            f"the scheme must be for the trace's {trace.num_workers} workers, got one for {made.num_workers}; "
            "make it with n as in the trace"
        )
    jobs = trace.num_rounds if jobs is None else jobs
    check_count("jobs", jobs, low=1, remedy="give the number of gradients to compute")
    if seconds_per_load is not None:
        check_slope(seconds_per_load)
    return made, jobs, trace.slope if seconds_per_load is None else float(seconds_per_load)


def _times(trace: Trace, round: int, loads: FloatArray, slope: float) -> FloatArray:
    """(workers,) seconds of the answers of a round: inf for one that never comes, -inf for a worker without a task."""
    seconds = trace.seconds[round % trace.num_rounds] + slope * (loads - trace.load)
    times = np.where(np.isnan(seconds), math.inf, np.maximum(seconds, 0.0))
    return np.where(np.isnan(loads), -math.inf, times)


def _end(times_of: RoundTimes, times: FloatArray, stop: str, mu: float) -> float:
    """When the rule ends the round."""
    last = float(times.max())
    if last == -math.inf:
        return 0.0  # nobody has a task
    first = float(times[times > -math.inf].min())
    if stop == "decodable":
        return max(first, min(last, times_of.may_end_at(times)))
    deadline, conforms_at = (1 + mu) * first, times_of.conforms_at(times)
    if stop == "paper":
        return min(last, deadline) if conforms_at <= deadline else last
    return min(last, max(deadline, conforms_at))


def _loads(tasks: list[list[Task]], chunks: FloatArray) -> FloatArray:
    """(workers,) what each computes of the whole data, NaN for one without a task."""
    return np.array([sum(chunks[chunk] for task in own for chunk, _ in task.row) if own else math.nan for own in tasks])


def _empty(scheme: Scheme, num_rounds: int) -> tuple[FloatArray, NDArray[np.bool_]]:
    return np.full(num_rounds, math.inf), np.zeros((scheme.num_workers, num_rounds), dtype=np.bool_)


def _simulated(
    scheme: Scheme, jobs: int, per_round: FloatArray, straggled: NDArray[np.bool_], trace: Trace
) -> Simulated:
    repeated = -(-len(per_round) // trace.num_rounds) - 1
    return Simulated(scheme=scheme, jobs=jobs, per_round=per_round, straggled=straggled, repeated=repeated)
