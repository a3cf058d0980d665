"""TensorBoard: how far the models are apart, how much of their spread averaging takes away, and what it costs."""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from distopt.errors import PeerLostError
from distopt.tensorboard import Events

if TYPE_CHECKING:
    from distopt.gossip.attachment import GossipAttachment

_COUNTED = ("exchanges", "passed", "bytes_sent", "seconds_exchanging", "meetings")


class TensorBoard(Events):
    """Writes the numbers of a rank, or of a simulation, to a folder. See `distopt.tensorboard.Events`.

    Each rank has a folder of its own, `runs/gossip/rank-3`, say: TensorBoard shows those below one folder together.
    """

    def record(self, attached: "GossipAttachment", **values: float) -> None:
        """Writes this rank's numbers, and how far all ranks' models are from their mean, at the present step.

        Collective, as `consensus_distance` is: every rank calls it at the same step. It waits for an exchange that is
        under way, so not in every step where exchanges overlap. Where a rank is lost meanwhile the distance is left
        out.

        Args:
            attached: What `attach` has returned.
            values: More numbers by name: a loss, an accuracy.
        """
        found = {}
        with contextlib.suppress(PeerLostError):  # the next exchange finds those that are left
            found["consensus_distance"] = attached.consensus_distance()
        stats = attached.stats()
        if stats["variance_ratio"] is not None:
            found["variance_ratio"] = stats["variance_ratio"]
        found["members"] = float(len(stats["members"]))
        self.write(stats["steps"], {**found, **{name: float(stats[name]) for name in _COUNTED}, **values})

    def __call__(self, row: Mapping[str, float]) -> None:
        """Writes a row of a `GossipHistory`: for `progress` of `simulate`."""
        self.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
