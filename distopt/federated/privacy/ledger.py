"""How many releases a job has made, by kind: what its epsilon is computed from, and what a checkpoint holds of it."""

from collections.abc import Mapping
from typing import Any

from distopt.errors import StateMismatchError


class Ledger:
    """Counts of releases.

    Args:
        kinds: Their names.

    Attributes:
        counts: By kind.
    """

    def __init__(self, *kinds: str) -> None:
        self.counts = dict.fromkeys(kinds, 0)

    def note(self, kind: str) -> None:
        """One more."""
        self.counts[kind] += 1

    def with_another(self, kind: str) -> dict[str, int]:
        """The counts if there were one more."""
        return {**self.counts, kind: self.counts[kind] + 1}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It counts other kinds, or is damaged.
        """
        known = set(state) == set(self.counts)
        if not known or not all(isinstance(count, int) and count >= 0 for count in state.values()):
            raise StateMismatchError(
                f"the ledger of a job's releases must count {', '.join(self.counts)}, got {dict(state)!r:.200}; the "
                "checkpoint is damaged, or of another algorithm"
            )
        self.counts = {kind: state[kind] for kind in self.counts}
