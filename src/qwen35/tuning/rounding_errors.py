"""What candidates do to weights: decoded values minus the exact ones, encoded like an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from qwen35.checkpoint.source import Reader
from qwen35.codecs.codec import Codec, Piece
from qwen35.codecs.devices import Kernels
from qwen35.codecs.roundtrip import RoundTrip
from qwen35.execution.survey import Survey
from qwen35.planning.output_plan import Plan
from qwen35.planning.rows import RowChunk
from qwen35.planning.step import Step
from qwen35.tensors import TensorSpec

if TYPE_CHECKING:
    from qwen35.array_types import F32, I64

__all__ = ["RoundingErrors", "RowChoice", "row_parts"]

RowChoice = Callable[[RowChunk], "I64"]
"""Returns the rows of a chunk to encode, from 0 on, in order."""


@dataclass(frozen=True)
class RoundingErrors:
    """The errors of some rows of a weight in several codecs.

    Args:
        plan: the plan of `step`.
        step: the weight's step.
        chunks: the rows, from `row_parts`.
        chosen: which of them.
        codecs: choice to codec.
        kernels: encoding kernels.
        survey: the largest magnitudes of weights.
    """

    plan: Plan
    step: Step
    chunks: Sequence[RowChunk]
    chosen: RowChoice
    codecs: Mapping[str, Codec]
    kernels: Kernels
    survey: Survey

    def pieces(self, reader: Reader) -> Iterator[tuple[RowChunk, I64, dict[str, F32]]]:
        """Yield chunks with the chosen rows and the error of each choice, [rows, row].

        Rows are in the order of the output, columns too. Memory is one piece and the encoded rows.

        Raises:
            TensorError: a weight cannot be read, or holds values that a codec cannot represent.
        """
        from qwen35.codecs.floats import f32_from  # late: pulls in numpy

        taken = [(chunk, self.chosen(chunk)) for chunk in self.chunks]
        taken = [(chunk, rows) for chunk, rows in taken if len(rows)]
        if not taken:
            return
        trips = self._trips(reader, sum(len(rows) for _, rows in taken))
        for piece in self._read(reader, taken):
            for trip in trips.values():
                trip.add(piece)
        for trip in trips.values():
            trip.finish()
        # Read a second time, which is cheap: all of it may be larger than memory.
        for (chunk, rows), piece in zip(taken, self._read(reader, taken), strict=True):
            exact = f32_from(piece.values, piece.dtype)
            yield chunk, rows, {name: trip.decoded(piece) - exact for name, trip in trips.items()}

    def _read(self, reader: Reader, taken: Sequence[tuple[RowChunk, I64]]) -> Iterator[Piece]:
        """Yield the chosen rows of chunks, numbered as if there were no others."""
        opened, done = self.step.rows.open(reader), 0
        for chunk, rows in taken:
            piece = opened.piece(chunk, self.plan.options.importance(self.step, chunk.slab))
            values = piece.values if len(rows) == chunk.count else piece.values[rows]
            yield Piece(done, values, piece.dtype, piece.importance)
            done += len(rows)

    def _trips(self, reader: Reader, count: int) -> dict[str, RoundTrip]:
        rows = self.step.rows
        # all of a weight in its own shape: experts have scales of their own
        shape = rows.shape if count == prod(rows.shape[:-1]) else (count, rows.row)
        spec = TensorSpec(self.step.targets[0].name, self.step.spec.dtype, shape)
        return {
            choice: RoundTrip(
                codec,
                spec,
                settings=self.plan.settings,
                kernel=self.kernels.of(codec.name),
                largest=self.survey.of_rows(self.step, reader) if codec.surveys else None,
            )
            for choice, codec in self.codecs.items()
        }


def row_parts(step: Step, codecs: Sequence[Codec]) -> Iterator[list[RowChunk]]:
    """Yield the chunks to encode together: single ones, or all of a weight."""
    chunks = step.rows.chunks(row_grain(step, codecs))
    if whole_matrices(step, codecs) or not all(codec.independent for codec in codecs):
        yield list(chunks)
    else:
        yield from ([chunk] for chunk in chunks)


def row_grain(step: Step, codecs: Sequence[Codec]) -> int:
    """Return the number of rows that must be encoded together."""
    return max((codec.grain(step.spec) for codec in codecs), default=1)


def whole_matrices(step: Step, codecs: Sequence[Codec]) -> bool:
    """Return whether all rows of a stack are encoded: a codec has a scale for each matrix of it."""
    return len(step.rows.shape) > 2 and any(codec.surveys for codec in codecs)
