"""Why an exchange could not be completed: a member's connection is gone, or a member says nothing."""

from collections.abc import Sequence


class BrokenError(Exception):
    """A connection of the group is gone.

    Attributes:
        places: Places in the group of those whose connections are.
    """

    def __init__(self, places: Sequence[int]) -> None:
        super().__init__(f"connections to places {sorted(places)} are gone")
        self.places = tuple(sorted(places))


class SilentError(Exception):
    """A connected member has said nothing for as long as it may.

    Attributes:
        place: Its place in the group.
    """

    def __init__(self, place: int) -> None:
        super().__init__(f"place {place} is silent")
        self.place = place
