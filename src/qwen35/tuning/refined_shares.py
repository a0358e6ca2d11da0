"""What refined codes leave of each price, compared on some rows of each weight.

Prices add up squared errors weight by weight. Those of refined codes are larger and cancel in a
layer's outputs, so they cannot be added up so. What can be compared is the error in outputs on
held-out tokens, trace(E H E^T), of refined and of nearest codes: the price of rounding weights
falls by as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import fsum
from typing import TYPE_CHECKING

from qwen35.checkpoint.source import Reader
from qwen35.codecs.codec import Codec, EncodingRequest, Piece
from qwen35.codecs.devices import kernels_for
from qwen35.display import size
from qwen35.errors import UsageError
from qwen35.execution.refiners import Curvatures
from qwen35.execution.survey import Survey
from qwen35.planning.hessians import Hessians
from qwen35.planning.refinement import curvature_memory
from qwen35.planning.rows import RowChunk, RowSpan
from qwen35.planning.step import Step
from qwen35.progress import Progress
from qwen35.tensors import TensorSpec
from qwen35.tuning.prices import RefinedShares
from qwen35.tuning.rounding_errors import row_grain
from qwen35.tuning.space import ChoiceSpace

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8
    from qwen35.codecs.refining import CodeGrid, Curvature, Refining

__all__ = ["comparing_memory", "measure_shares"]

_ROWS = 64
"""Rows of a matrix that are compared; more if a codec encodes more together."""

_CHUNKS = 4
"""Places that they are taken from."""

_MATRICES = 8
"""Matrices of a stack that are compared."""


@dataclass
class _Losses:
    """Errors in outputs on held-out tokens of some rows, by way of choosing codes."""

    curvature: Curvature
    refining: Refining
    nearest: list[float] = field(default_factory=list)
    refined: list[float] = field(default_factory=list)

    def refine(self, first: int, weights: F32, grid: CodeGrid) -> U8:
        """Note what both codes of rows lose (`qwen35.codecs.codec.Refine`)."""
        del first
        losses = self.refining.row_losses
        codes = self.refining.refined_codes(weights, grid, self.curvature)
        self.nearest += losses(weights, grid, grid.codes, self.curvature).tolist()
        self.refined += losses(weights, grid, codes, self.curvature).tolist()
        return codes

    @property
    def both(self) -> tuple[float, float]:
        """Those of nearest codes, and of whichever are better."""
        nearest = fsum(self.nearest)
        return nearest, min(nearest, fsum(self.refined))


@dataclass(frozen=True)
class _Matrix:
    """A matrix that is compared: a slab of a unit's step."""

    unit: str
    step: Step
    slab: int


def measure_shares(
    space: ChoiceSpace,
    hessians: Hessians,
    threads: int,
    progress: Progress,
) -> RefinedShares:
    """Compare refined codes with the nearest ones, on some rows of each weight.

    Args:
        space: the choices.
        hessians: of its checkpoint.
        threads: most threads.
        progress: receives matrices.

    Raises:
        InputError: Hessians are damaged.
        TensorError: a weight cannot be read, or holds values that a codec cannot represent.
    """
    matrices = list(_matrices(space))
    sums: dict[str, dict[str, tuple[float, float]]] = {unit.name: {} for unit in space.units}
    progress.begin(f"refining samples of {space.checkpoint.name}", len(matrices))
    try:
        with Reader(space.checkpoint) as reader, ThreadPoolExecutor(threads) as pool:
            compare = _CodeComparison(space, reader, Curvatures(hessians)).compare
            # in order of the matrices, so that sums do not depend on the threads' timing
            for matrix, found in zip(matrices, pool.map(compare, matrices), strict=True):
                row = sums[matrix.unit]
                for choice, (nearest, kept) in found.items():
                    before = row.get(choice, (0.0, 0.0))
                    row[choice] = before[0] + nearest, before[1] + kept
                progress.advance(1, matrix.step.weight.name)
    finally:
        progress.end()
    shares = {
        unit.name: {choice: _share(sums[unit.name].get(choice)) for choice in unit.sizes}
        for unit in space.units
    }
    return RefinedShares(hessians.sha256, shares)


def _share(sums: tuple[float, float] | None) -> float:
    return sums[1] / sums[0] if sums is not None and sums[0] > 0 else 1.0


def _matrices(space: ChoiceSpace) -> Iterator[_Matrix]:
    for unit, steps in space.members.items():
        for step in steps:
            count = len(step.rows.slabs)
            taken = min(count, _MATRICES)
            yield from (_Matrix(unit, step, i * count // taken) for i in range(taken))


class _CodeComparison:
    """What both ways of choosing codes do to a matrix; thread-safe.

    Args:
        space: the choices.
        reader: of its checkpoint.
        curvatures: of the inputs.
    """

    def __init__(self, space: ChoiceSpace, reader: Reader, curvatures: Curvatures) -> None:
        self._space, self._reader, self._curvatures = space, reader, curvatures
        self._survey = Survey()
        [self._kernels] = kernels_for("cpu")

    def compare(self, matrix: _Matrix) -> dict[str, tuple[float, float]]:
        """Return `_Losses.both` of each choice whose codes can be refined."""
        codecs = {c: one for c, one in self._space.packed(matrix.unit).items() if one.refines}
        curvature = self._curvatures.of(matrix.step.rows, matrix.slab) if codecs else None
        if curvature is None or not curvature.useful:
            return {}
        pieces = list(self._pieces(matrix, row_grain(matrix.step, list(codecs.values()))))
        return {
            choice: self._losses(matrix, codec, pieces, curvature)
            for choice, codec in codecs.items()
        }

    def _pieces(self, matrix: _Matrix, grain: int) -> Iterator[Piece]:
        """Yield some rows of a matrix, numbered as if there were no others."""
        rows = matrix.step.rows
        importance = self._space.plan.options.importance(matrix.step, matrix.slab)
        chunks = list(
            rows.chunks(grain, RowSpan(range(matrix.slab, matrix.slab + 1), 0, rows.count))
        )
        taken = min(len(chunks), max(1, _ROWS // grain), _CHUNKS)
        opened, done = rows.open(self._reader), 0
        for i in range(taken):
            chunk = chunks[i * len(chunks) // taken]
            piece = opened.piece(chunk, importance)
            values = piece.values[_spread(chunk, grain, max(1, _ROWS // grain // taken))]
            yield replace(piece, first=done, values=values)
            done += len(values)

    def _losses(
        self, matrix: _Matrix, codec: Codec, pieces: list[Piece], curvature: Curvature
    ) -> tuple[float, float]:
        step, losses = matrix.step, _Losses(curvature, self._kernels.refining)
        shape = sum(len(piece.values) for piece in pieces), step.rows.row
        spec = TensorSpec(step.targets[0].name, step.spec.dtype, shape)
        largest = None
        if codec.surveys:
            number = matrix.slab * step.rows.count // step.rows.shape[-2]
            largest = self._survey.of_rows(step, self._reader)[number : number + 1]
        encoding = codec.encode(
            EncodingRequest(
                step.weight.name,
                spec,
                codec.layout(spec),
                lambda *_: None,
                self._space.plan.settings,
                self._kernels.of(codec.name),
                largest=largest,
                refine=losses.refine,
            )
        )
        for piece in pieces:
            encoding.add(piece)
        encoding.finish()
        return losses.both


def _spread(chunk: RowChunk, grain: int, wanted: int) -> list[int]:
    """Return the rows of so many grains of a chunk, from 0 on, in order."""
    grains = -(-chunk.count // grain)
    taken = min(grains, wanted)
    starts = [i * grains // taken * grain for i in range(taken)]
    return [n for start in starts for n in range(start, min(start + grain, chunk.count))]


def comparing_memory(space: ChoiceSpace, threads: int, memory: int | None) -> tuple[int, int]:
    """Return how many threads may compare at a time, and the bytes that Hessians take then.

    Args:
        space: the choices.
        threads: most threads.
        memory: most bytes; None for no limit.

    Raises:
        UsageError: not even one may.
    """
    widest = max(step.rows.row for steps in space.members.values() for step in steps)
    while threads > 1 and memory is not None and curvature_memory(widest, threads) > memory:
        threads -= 1
    needed = curvature_memory(widest, threads)
    if memory is not None and needed > memory:
        expected = f"at least {size(needed)}, for Hessians of {widest:,} columns"
        raise UsageError(f"--memory {size(memory)}", "too little", expected=expected)
    return threads, needed
