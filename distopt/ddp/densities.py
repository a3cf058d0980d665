"""Per-parameter policy: which parameters are sent whole, and which have a density of their own."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from distopt.ddp.parameters import LARGEST_INDEX
from distopt.errors import CompatibilityError


def choose_densities(
    parameters: Mapping[str, Tensor], default: float, skip: Sequence[str], overrides: Mapping[str, float]
) -> dict[str, float | None]:
    """The final density of each parameter, or None for those that are sent whole.

    Tensors of at most one dimension are sent whole: biases and norm weights are few and sensitive (DGC, section 3).

    Args:
        parameters: By name.
        default: Density where no pattern matches.
        skip: Shell patterns of names to send whole.
        overrides: Shell pattern of names to their density; the first that matches counts.

    Raises:
        CompatibilityError: A pattern matches no name, or only tensors that are always sent whole; or a tensor is too
            large for int32 positions.
    """
    for pattern in (*skip, *overrides):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise CompatibilityError(
                f"the pattern {pattern!r} must match a parameter, got none among {_some(parameters)}; "
                "see dict(model.named_parameters()) for the names"
            )
    for pattern, density in overrides.items():
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if density != 1.0 and all(parameters[name].dim() <= 1 for name in matched):
            raise CompatibilityError(
                f"the pattern {pattern!r} with density {density} must match a tensor of two or more dimensions, got "
                f"only {_some(matched)}; smaller ones are always sent whole: leave it out"
            )
    chosen: dict[str, float | None] = {}
    for name, parameter in parameters.items():
        density = next((value for pattern, value in overrides.items() if fnmatchcase(name, pattern)), default)
        whole = parameter.dim() <= 1 or density == 1.0 or any(fnmatchcase(name, pattern) for pattern in skip)
        if not whole and parameter.numel() > LARGEST_INDEX:
            raise CompatibilityError(
                f"a compressed tensor can have at most {LARGEST_INDEX} entries, {name!r} has {parameter.numel()}; "
                f"add it to skip=({name!r},) or split it"
            )
        chosen[name] = None if whole else density
    return chosen


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
