"""The exchange of one round between real ranks: point to point, with the round's senders and receivers."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from distopt.comm.crew.interruption import BrokenError, SilentError
from distopt.comm.crew.staging import Staging
from distopt.gossip.codec import Codec
from distopt.gossip.graph import Graph
from distopt.ops import weighted_sum_
from distopt.spans import span

_TAGS_PER_ROUND = 64
_MOST_TAGS = 1 << 30
_MOST_PIECES = 16  # of a row that is averaged while it arrives
_PIECE_BYTES = 4 << 20  # at least
_BLOCK = 1 << 16  # elements that are averaged at a time: they stay in the cache


class RankMixer:
    """See `Mixer`. The one row is this rank's.

    Args:
        group: A gloo group; nobody else uses it meanwhile.
        place: Of this rank in the group.
        graph: Of the round, one node for each place.
        number: Of the round.
        staging: Of this rank.
        patience_s: For a connected member to say something.

    Attributes:
        bytes_sent: By this rank.
    """

    def __init__(self, group: Any, place: int, graph: Graph, number: int, staging: Staging, patience_s: float) -> None:
        self._patience = timedelta(seconds=patience_s)
        self._group, self._place, self._staging = group, place, staging
        self._weights = graph.weights[place]
        self._receivers, self._senders = graph.receivers(place), graph.senders(place)
        self.squares = torch.tensor([float((self._weights**2).sum())], dtype=torch.float64)
        self._tag = number * _TAGS_PER_ROUND
        self._operations = 0
        self.bytes_sent = 0

    def mix(self, *rows: Tensor, by_squares: Tensor | None = None) -> tuple[Tensor, ...]:
        """See `Mixer.mix`."""
        sent = [*rows] if by_squares is None else [*rows, by_squares]
        arrived = self._swap([row.reshape(-1) for row in sent])
        mixed = []
        for index, row in enumerate(sent):
            squared = by_squares is not None and index == len(rows)
            weights = self._weights**2 if squared else self._weights
            mixed.append(self._averaged(row, [each[index] for each in arrived], weights))
        return tuple(mixed)

    def mix_(self, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """See `Mixer.mix_`. Averages what has arrived while the rest is under way, and undoes that if it breaks."""
        if rows.is_cuda or rows.dtype != torch.float32 or not (rows.is_contiguous() and rows.numel()):
            mixed, *rest = self.mix(rows, *others)
            rows.copy_(mixed)
            return tuple(rest)
        broken: set[int] = set()
        row = rows.view(-1)
        pieces = row.chunk(max(1, min(_MOST_PIECES, row.nbytes // _PIECE_BYTES)))
        arriving = [
            self._staging.like((self._operations, sender, 0), row).split(len(pieces[0])) for sender in self._senders
        ]
        self._operations += 1
        told, beside = self._begin_swap([each.reshape(-1) for each in others], broken)
        works: list[list[tuple[int, Any]]] = []
        for index, piece in enumerate(pieces):
            works.append([])
            self._exchange_piece(works[-1], broken, piece, [each[index] for each in arriving])
        scratch = self._staging.like("scratch", row[:_BLOCK])
        averaged = 0
        try:
            for index, piece in enumerate(pieces):
                self._wait(works[index], broken)
                if not broken and arriving:
                    self._average_arrived_(piece, [each[index] for each in arriving], scratch)
                    averaged += 1
            self._wait(beside, broken)
            if broken:
                raise BrokenError(sorted(broken))
        except BaseException:
            for piece, before in zip(pieces[:averaged], arriving[0][:averaged] if arriving else (), strict=True):
                piece.copy_(before)
            raise
        if not arriving:
            row.mul_(float(self._weights[self._place]))
        return tuple(
            self._averaged(each, [told_by[index] for told_by in told], self._weights)
            for index, each in enumerate(others)
        )

    def _average_arrived_(self, own: Tensor, others: Sequence[Tensor], scratch: Tensor) -> None:
        """Averages in place, and leaves what was there where the first of the others has arrived.

        Block by block: what has arrived is still in the cache.
        """
        weights = [float(self._weights[self._place]), *(float(self._weights[sender]) for sender in self._senders)]
        with span("gossip", "average"):
            for start in range(0, len(own), _BLOCK):
                row, *rest = (each[start : start + _BLOCK] for each in (own, *others))
                average = scratch[: len(row)]
                weighted_sum_(average, [row, *rest], weights)
                rest[0].copy_(row)
                row.copy_(average)

    def mix_coded(self, rows: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
        """See `Mixer.mix_coded`."""
        width = rows.shape[1]
        code = codec.encode(rows[0])
        arrived = self._swap([code])
        own = codec.decode(code, width, rows.dtype)
        others = [codec.decode(each[0], width, rows.dtype) for each in arrived]
        return own.view(1, -1), self._averaged(own.view(1, -1), others, self._weights)

    def _averaged(self, row: Tensor, others: Sequence[Tensor], weights: Any) -> Tensor:
        parts = [float(weights[self._place]), *(float(weights[sender]) for sender in self._senders)]
        wide = torch.promote_types(row.dtype, torch.float32)
        out = torch.empty(row.numel(), dtype=wide, device=row.device)
        if row.numel():
            with span("gossip", "average"):
                weighted_sum_(out, [row.reshape(-1), *(other.to(row.device) for other in others)], parts)
        return out.to(row.dtype).view(row.shape)

    def _swap(self, rows: Sequence[Tensor]) -> list[list[Tensor]]:
        """What each sender has sent for each of the rows."""
        broken: set[int] = set()
        arrived, works = self._begin_swap(rows, broken)
        self._wait(works, broken)
        if broken:
            raise BrokenError(sorted(broken))
        return arrived

    def _begin_swap(self, rows: Sequence[Tensor], broken: set[int]) -> tuple[list[list[Tensor]], list[tuple[int, Any]]]:
        """Where what each sender sends for each of the rows will be, and what must be waited for."""
        outgoing = [self._to_send(index, row) for index, row in enumerate(rows)]
        arrived = [
            [self._staging.like((self._operations, sender, index), row) for index, row in enumerate(outgoing)]
            for sender in self._senders
        ]
        self._operations += 1
        works: list[tuple[int, Any]] = []
        for index, row in enumerate(outgoing):
            if row.numel():
                self._exchange_piece(works, broken, row, [buffers[index] for buffers in arrived])
        return arrived, works

    def _exchange_piece(
        self, works: list[tuple[int, Any]], broken: set[int], piece: Tensor, arriving: Sequence[Tensor]
    ) -> None:
        """Begins to send it to all receivers and to take as much of each sender."""
        for sender, buffer in zip(self._senders, arriving, strict=True):
            self._begin(works, broken, sender, self._group.recv, buffer)
        for receiver in self._receivers:
            self._begin(works, broken, receiver, self._group.send, piece)
            self.bytes_sent += piece.nbytes
        self._tag += 1

    def _wait(self, works: Sequence[tuple[int, Any]], broken: set[int]) -> None:
        with span("gossip", "transfer"):
            for place, work in works:
                try:
                    work.wait(self._patience)  # else it is the time for the group's connections
                except RuntimeError as error:
                    if "imed out" in str(error):
                        raise SilentError(place) from None
                    broken.add(place)

    def _begin(
        self, works: list[tuple[int, Any]], broken: set[int], place: int, operation: Callable[..., Any], buffer: Tensor
    ) -> None:
        try:
            works.append((place, operation([buffer], place, self._tag % _MOST_TAGS)))
        except RuntimeError:
            broken.add(place)

    def _to_send(self, index: int, row: Tensor) -> Tensor:
        if not row.is_cuda:
            return row.contiguous()
        staged = self._staging.like(("own", index), row)
        staged.copy_(row, non_blocking=True)
        torch.cuda.current_stream(row.device).synchronize()
        return staged
