"""TensorBoard: a run's values while it goes on, or those of a finished one.

Written are the evaluated values, how many clients took part, and the bytes of each round, over rounds. Where a run has
a virtual time it is the events' time, so TensorBoard's horizontal axis "Relative" is the virtual time.
"""

from collections.abc import Mapping
from typing import Any

from distopt.federated.curves import evaluated
from distopt.tensorboard import Events


class TensorBoard(Events):
    """A `progress` for a simulation that writes each round to a folder. See `distopt.tensorboard.Events`."""

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Writes a row of a history."""
        values = {
            **evaluated(row),
            "clients": len(row["participants"]),
            "bytes/down": row["bytes_down"],
            "bytes/up": row["bytes_up"],
        }
        self.write(row["round"], values, row.get("time_s"))
