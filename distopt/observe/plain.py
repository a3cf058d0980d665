"""Statistics as JSON can hold them, and as named numbers and texts."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON can hold it.

    JSON has no NaN and no infinity: they become the texts "nan", "inf" and "-inf", which `float` reads.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # an array, a number of NumPy or a tensor
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that is no mapping and no list, with its name: the keys and places on the way to it, joined by "/"."""
    if isinstance(value, Mapping):
        inside: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    else:
        yield name, value
        return
    for key, each in inside:
        yield from leaves(each, f"{name}/{key}" if name else str(key))


def numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    """What is a number, by name; True is 1."""
    return {name: float(value) for name, value in leaves(stats) if isinstance(value, bool | int | float)}


def texts(stats: Mapping[str, Any]) -> dict[str, str]:
    """What is a text, by name."""
    return {name: value for name, value in leaves(stats) if isinstance(value, str)}
