"""When a server makes the next model: when all have answered, every so often, or at every so many answers.

| pacing | the server aggregates | a client begins anew |
|---|---|---|
| `Synchronous` | when all that were asked have answered | when it is asked again |
| `EveryInterval` | every Dt | at the aggregation after its answer |
| `AfterArrivals` | when so many have answered | at once, or with no `concurrency` at the next aggregation |

Limits: a client whose answer waits for the next aggregation is not asked again before, so no aggregation has two
answers of one client.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Synchronous:
    """The server waits for everybody that it has asked."""


@dataclass(frozen=True, kw_only=True)
class EveryInterval:
    """The server takes what has arrived when an interval ends, that very moment included; it may be nothing.

    Attributes:
        seconds: Dt.
    """

    seconds: float


@dataclass(frozen=True, kw_only=True)
class AfterArrivals:
    """The server waits until so many have answered.

    Attributes:
        count: How many.
        concurrency: How many clients work at a time, chosen at random of those that may; None for all of them.
    """

    count: int
    concurrency: int | None = None


Pacing = Synchronous | EveryInterval | AfterArrivals
