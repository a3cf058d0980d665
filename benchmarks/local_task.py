"""What the benchmarks of local steps train: the transformer of examples/internet_training.py, on the King James Bible.

The text is that of examples/lm_dgc.py (Debian's package bible-kjv) or a file; nothing is downloaded.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import internet_training as example
import lm_dgc


class Task:
    """The text in two parts, models and batches. The same seed gives the same of each, whoever trains how.

    Args:
        text: A file; None for the Bible.
        width: Of the transformer, which has two layers.
        batch_size: Sequences of one rank and step.
    """

    def __init__(self, text: str | None, *, width: int = 128, batch_size: int = 8) -> None:
        self.train, self.held_out, self.num_characters = example.numbered(lm_dgc.read_text(text and Path(text)))
        self._width, self._batch_size = width, batch_size

    def model(self, seed: int) -> nn.Module:
        """A new model."""
        torch.manual_seed(seed)
        return example.Transformer(self.num_characters, width=self._width)

    def batch(self, seed: int, step: int, rank: int) -> Tensor:
        """The sequences of one rank in a step: (batch_size, length + 1)."""
        return example.windows(self.train, self._batch_size, seed=(seed * 1_000 + rank) * 1_000_000 + step)

    @staticmethod
    def loss(model: nn.Module, sequences: Tensor) -> Tensor:
        """Mean per character, in nats."""
        return example.loss_of(model, sequences)

    def held_out_loss(self, model: nn.Module) -> float:
        """On sequences from the whole of the held-out part."""
        return example.loss_on(model, self.held_out)
