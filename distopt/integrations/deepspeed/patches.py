"""Replacing methods on one object, so that they can be put back as they were."""

from collections.abc import Callable
from typing import Any

from distopt.errors import CompatibilityError


class Patches:
    """What has been replaced on one object."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def replace(self, target: Any, name: str, method: Callable[..., Any]) -> None:
        """Puts a method on the object itself, in front of its class's or of one that lies there already."""
        before = vars(target).get(name)
        had = name in vars(target)
        setattr(target, name, method)

        def undo() -> None:
            if vars(target).get(name) is not method:
                return  # somebody has replaced ours since: theirs stays
            if had:
                setattr(target, name, before)
            else:
                delattr(target, name)

        self._undo.append(undo)

    def afterwards(self, undo: Callable[[], object]) -> None:
        """Calls this too when all is undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Puts everything back, the latest first."""
        while self._undo:
            self._undo.pop()()


def check_untouched(target: Any, name: str) -> None:
    """Raises `CompatibilityError` if the method has been replaced on this object."""
    if name in vars(target):
        raise CompatibilityError(
            f"{name} of the engine must be DeepSpeed's own, got one that something has put in its place; attach once, "
            "and call detach() before the next"
        )
