"""What a model of a given size would cost on a link, per route, for any number of ranks: what `distopt link` prints.

The model is taken as one bucket of matrices: the few entries that are always sent whole are left out.
"""

import dataclasses
from collections.abc import Sequence

import torch

from distopt.comm import Place
from distopt.compress import INDEX_FORMATS, WIRE_DTYPES
from distopt.config import check_choice, check_count, check_density
from distopt.ddp.memory import ErrorFeedback
from distopt.ddp.parameters import LARGEST_INDEX, TrackedParameter
from distopt.ddp.plan import BucketPlan, plan_bucket
from distopt.ddp.policy import Routing, WirePolicy
from distopt.ddp.prediction import Predictor

ROUTES = ("whole", "allgather", "balanced")
_LEAST_DENSITY = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """One route at one number of ranks.

    Attributes:
        route: "whole" is the dense all-reduce.
        num_ranks: N.
        link_bytes: Bytes that each rank puts on the link per step.
        seconds: Predicted, of the exchange of a step with selection and decoding.
    """

    route: str
    num_ranks: int
    link_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Asks the same plans and the same predictor as `exchange="auto"` does.

    Attributes:
        numel: Parameters of the model.
        predictor: Of the link and of the machine.
        values: As in `distopt.DGC`.
        indices: As in `distopt.DGC`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    numel: int
    predictor: Predictor
    values: str = "fp32"
    indices: str = "int32"

    def __post_init__(self) -> None:
        check_count("numel", self.numel, low=1, remedy="use the number of parameters of the model")
        check_choice("values", self.values, tuple(WIRE_DTYPES))
        check_choice("indices", self.indices, tuple(INDEX_FORMATS))

    def plan(self, route: str, num_ranks: int, density: float) -> BucketPlan:
        """The plan of the largest bucket that positions can count, at most the whole model."""
        check_density("density", density)
        numel = min(self.numel, LARGEST_INDEX)
        entry = TrackedParameter(
            name="model",
            parameter=torch.empty((numel, 1), device="meta"),
            memory=ErrorFeedback(numel, torch.float32, torch.device("meta")),
            density=density,
        )
        policy = WirePolicy(
            value_dtype=WIRE_DTYPES[self.values],
            index_format=INDEX_FORMATS[self.indices],
            exchange=route,
            with_status=True,
            with_used_flags=False,
        )
        density = 1.0 if route == "whole" else density
        routing = Routing(place=Place(num_ranks=num_ranks), routes=(route,))
        return plan_bucket([entry], torch.float32, lambda _: density, policy, routing)

    def forecast(self, route: str, num_ranks: int, density: float) -> Forecast:
        """Bytes and seconds of one route."""
        plan = self.plan(route, num_ranks, density)
        buckets = self.numel / plan.numel
        return Forecast(
            route=route,
            num_ranks=num_ranks,
            link_bytes=round(plan.link_bytes * buckets),
            seconds=self.predictor(plan) * buckets,
        )

    def curves(self, ranks: Sequence[int], density: float) -> dict[str, list[Forecast]]:
        """Forecasts by route over numbers of ranks."""
        return {route: [self.forecast(route, n, density) for n in ranks] for route in ROUTES}

    def fastest(self, num_ranks: int, density: float) -> Forecast:
        """The route that takes least."""
        return min((self.forecast(route, num_ranks, density) for route in ROUTES), key=lambda found: found.seconds)

    def break_even_density(self, num_ranks: int, route: str = "allgather") -> float | None:
        """The density at which a sparse route takes as long as the dense all-reduce; None where it never is faster."""
        dense_s = self.forecast("whole", num_ranks, 1.0).seconds
        low, high = _LEAST_DENSITY, 0.999
        if self.forecast(route, num_ranks, low).seconds >= dense_s:
            return None
        if self.forecast(route, num_ranks, high).seconds < dense_s:
            return 1.0
        for _ in range(40):
            middle = (low * high) ** 0.5
            if self.forecast(route, num_ranks, middle).seconds < dense_s:
                low = middle
            else:
                high = middle
        return low
