"""What the server tells every client of a job: the rule, the local steps, the seed; as text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distopt.errors import ConfigError
from distopt.federated import FederatedAlgorithm, LocalTraining, UplinkCompression
from distopt.job import from_config


@dataclass(frozen=True, kw_only=True)
class Job:
    """The same for all clients.

    Attributes:
        algorithm: The rule.
        local: What a client does in a round.
        uplink: How the clients' vectors travel; None sends them as they are.
        exclude: Names of tensors that are not averaged, see `distopt.federated.Layout`.
        seed: Of batches and dropout.
    """

    algorithm: FederatedAlgorithm
    local: LocalTraining
    uplink: UplinkCompression | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def to_text(self) -> str:
        """JSON that `from_text` reads."""
        return json.dumps(
            {
                "algorithm": self.algorithm.to_dict(),
                "local": self.local.to_dict(),
                "uplink": None if self.uplink is None else self.uplink.to_dict(),
                "exclude": list(self.exclude),
                "seed": self.seed,
            }
        )

    @classmethod
    def from_text(cls, text: str) -> "Job":
        """The job that `to_text` wrote.

        Raises:
            ConfigError: It is no job, or of an algorithm or a setting that this process does not know.
        """
        try:
            parts: Mapping[str, Any] = json.loads(text)
            described, local, uplink = parts["algorithm"], parts["local"], parts["uplink"]
            exclude, seed = tuple(map(str, parts["exclude"])), int(parts["seed"])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"a job must be the text of the server's, got {text!r:.80} ({error}); server and clients need the same "
                "version of distopt"
            ) from error
        algorithm = from_config(described)
        if not isinstance(algorithm, FederatedAlgorithm):
            raise ConfigError(f"the algorithm of a job must be a federated one, got {algorithm.name!r}; use 'fedau'")
        return cls(
            algorithm=algorithm,
            local=LocalTraining.from_dict(local),
            uplink=None if uplink is None else UplinkCompression.from_dict(uplink),
            exclude=exclude,
            seed=seed,
        )
