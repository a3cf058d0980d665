"""The errors that distopt raises.

Each message gives the offending value, the rule it broke and what to do instead.
"""

from collections.abc import Sequence


class DistoptError(Exception):
    """Base of every error that distopt raises on purpose."""


class ConfigError(DistoptError, ValueError):
    """A configuration value breaks its rule, or a configuration key is unknown."""


class CompatibilityError(DistoptError, RuntimeError):
    """The model, optimizer or host cannot be combined with the algorithm that was asked for."""


class StateMismatchError(DistoptError, RuntimeError):
    """A checkpoint does not belong to this model, algorithm or set of ranks, or its file is damaged."""


class NonFiniteGradientError(DistoptError, ArithmeticError):
    """A gradient held NaN or Inf on at least one rank; raised on every rank with the same message."""


class DesyncError(DistoptError, RuntimeError):
    """The ranks disagree: about the configuration at attach, or about the step while training."""


class DecodeError(DistoptError, ValueError):
    """What arrived cannot be decoded: a payload does not fit its header, or too many coded messages are missing.

    Attributes:
        missing: The workers whose messages are missing, ascending; empty where a payload is at fault.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class PeerLostError(DistoptError, RuntimeError):
    """Other ranks of the job are gone: dead, stopped or cut off. Raised on every rank that is left.

    Attributes:
        ranks: Which ones, ascending.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


def in_a_line(error: BaseException) -> str:
    """Another's error for a message of ours: its type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
