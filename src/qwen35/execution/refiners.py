"""Refined codes of a plan's weights, kept where they are better on held-out tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from qwen35.planning.hessians import Hessians, InputHessian
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import KEPT, PLAIN, SEARCHED, hessian_of
from qwen35.planning.rows import Rows, RowSpan
from qwen35.planning.step import Step, StepTarget

if TYPE_CHECKING:
    from qwen35.array_types import F32, F64, I64, U8
    from qwen35.codecs.codec import Refine
    from qwen35.codecs.refining import CodeGrid, Curvature, Refining

__all__ = ["Curvatures", "Guard", "Refiners", "Written"]

Written = tuple[str, int, bytes]
"""Data on its way to a file: tensor, offset in bytes, data."""

_GREATER = 2
"""How many times the error of the weights themselves may grow: comparisons rely on it."""


class Refiners:
    """The guards of the steps of a plan, and the curvatures that they share; thread-safe."""

    def __init__(self, plan: Plan) -> None:
        hessians = plan.options.refinement.hessians
        self._curvatures = None if hessians is None else Curvatures(hessians)
        self._guards: dict[tuple[Rows, str, tuple[str, ...]], Guard] = {}

    def use(self, hessians: Hessians) -> None:
        """Take the inputs of steps that begin from now on from other Hessians of the same model."""
        self._curvatures = Curvatures(hessians)

    def begin(self, step: Step, refining: Refining) -> None:
        """Prepare the guards of a step that is about to run, whole, on a device."""
        for target in step.targets:
            if target.codes != PLAIN and self._curvatures is not None:
                self._guards[_key(step, target)] = Guard(
                    step.rows, self._curvatures, refining, searches=target.codes == SEARCHED
                )

    def of(self, step: Step, target: StepTarget) -> Guard | None:
        """Return the guard of a target; None if its codes are plain."""
        return self._guards.get(_key(step, target))

    def take(self, step: Step, target: StepTarget) -> str:
        """Forget the guard of a finished target; return its digits (`refined_record`), if any."""
        guard = self._guards.pop(_key(step, target), None)
        return "" if guard is None else guard.digits


def _key(step: Step, target: StepTarget) -> tuple[Rows, str, tuple[str, ...]]:
    return step.rows, target.codec, target.files


class Guard:
    """Refines the codes of one weight, and holds them back until it is known if they are better.

    Each matrix of a stack is judged by itself.

    Args:
        rows: of the weight.
        curvatures: of the inputs.
        refining: chooses codes.
        searches: whether scales are searched too.
    """

    def __init__(
        self, rows: Rows, curvatures: Curvatures, refining: Refining, *, searches: bool = False
    ) -> None:
        self._rows, self._curvatures, self._refining = rows, curvatures, refining
        self.searches = searches
        self._judged: dict[int, _Judged] = {}
        self._better: dict[int, int] = {}
        self._lock = Lock()

    @property
    def digits(self) -> str:
        """A digit for each matrix: 1 if it has refined codes, 2 if with searched scales."""
        return "".join(str(self._better.get(i, _NEAREST)) for i in range(len(self._rows.slabs)))

    def refine(self, first: int, weights: F32, grid: CodeGrid) -> U8:
        """Return refined codes of rows (`qwen35.codecs.codec.Refine`)."""
        curvature, rows, judged = self._about(first, len(weights))
        if curvature is None:
            return grid.codes
        codes = self._refining.refined_codes(weights, grid, curvature)
        losses = self._refining.row_losses
        judged.note(_NEAREST, rows, weights, grid, losses(weights, grid, grid.codes, curvature))
        refined = replace(grid, codes=codes)
        judged.note(_REFINED, rows, weights, refined, losses(weights, grid, codes, curvature))
        return codes

    def again(self, first: int, weights: F32, grid: CodeGrid) -> U8:
        """Return what `refine` returned; nothing is judged."""
        curvature, _, _ = self._about(first, len(weights))
        if curvature is None:
            return grid.codes
        return self._refining.refined_codes(weights, grid, curvature)

    def search(self, first: int, weights: F32, grid: CodeGrid, others: F32) -> tuple[U8, U8]:
        """Return refined codes of rows, and their scales (`qwen35.codecs.codec.Search`)."""
        import numpy as np

        from qwen35.codecs.refining import nearest_codes

        curvature, rows, judged = self._about(first, len(weights))
        if curvature is None:
            return grid.codes, np.zeros(grid.scales.shape, np.uint8)
        self.refine(first, weights, grid)  # to know which is better
        chosen = self._refining.searched_scales(weights, grid, others, curvature)
        all_ = np.concatenate([grid.scales[None], others])
        scales = np.take_along_axis(all_, chosen[None].astype(np.intp), 0)[0]
        near = replace(grid, scales=scales)
        near = replace(near, codes=nearest_codes(weights, near))
        codes = self._refining.refined_codes(weights, near, curvature)
        losses = self._refining.row_losses
        nearest = losses(weights, near, near.codes, curvature)
        judged.note(_SEARCHED_NEAREST, rows, weights, near, nearest)
        refined = replace(near, codes=codes)
        judged.note(_SEARCHED, rows, weights, refined, losses(weights, near, codes, curvature))
        return codes, chosen

    def _about(self, first: int, count: int) -> tuple[Curvature | None, slice, _Judged]:
        """Return what is known of rows: curvature, if it is useful, place, and matrix."""
        slab, row = divmod(first, self._rows.count)
        curvature = self._curvatures.of(self._rows, slab)
        useful = curvature if curvature is not None and curvature.useful else None
        return useful, slice(row, row + count), self._of(slab)

    def _of(self, slab: int) -> _Judged:
        with self._lock:
            return self._judged.setdefault(slab, _Judged.of(self._rows.count))

    def finished(
        self, span: RowSpan, written: Sequence[tuple[int, Written]]
    ) -> list[MatrixVerdict]:
        """Note a finished span; return the matrices that are complete now.

        Args:
            span: the rows.
            written: what is to be written of them, with the numbers of its matrices.
        """
        complete = []
        for slab in span.slabs:
            judged = self._of(slab)
            with self._lock:
                judged.held += [data for number, data in written if number == slab]
                judged.rows += span.count
                whole = judged.rows == self._rows.count
            if whole:
                complete.append(self._verdict(slab, judged))
        return complete

    def _verdict(self, slab: int, judged: _Judged) -> MatrixVerdict:
        best = judged.best
        with self._lock:
            self._better[slab] = best
            del self._judged[slab]
        written = _SEARCHED if self.searches else _REFINED
        held = judged.held if best == written or not judged.losses.any() else None
        return MatrixVerdict(slab, held, self.again if best == _REFINED else None)


@dataclass(frozen=True)
class MatrixVerdict:
    """The end of a matrix.

    Args:
        slab: its number.
        held: what is to be written of it; None if it is to be encoded again.
        refine: chooses its codes then; None for the nearest.
    """

    slab: int
    held: Sequence[Written] | None
    refine: Refine | None = None


_NEAREST, _REFINED, _SEARCHED, _SEARCHED_NEAREST = range(4)
"""Ways of encoding a matrix, the first three with the digits of manifests; the last is not written:
the nearest codes for the searched scales."""


@dataclass
class _Judged:
    """A matrix: its rows' losses on held-out tokens and squared errors, and what is held back.

    Args:
        losses: [ways, rows] float64.
        squared: [ways, rows] float64.
        rows: how many are complete.
        held: what is to be written.
    """

    losses: F64
    squared: F64
    rows: int = 0
    held: list[Written] = field(default_factory=list)

    @classmethod
    def of(cls, count: int) -> _Judged:
        import numpy as np

        return cls(np.zeros((4, count)), np.zeros((4, count)))

    def note(self, way: int, rows: slice, weights: F32, grid: CodeGrid, losses: F64) -> None:
        """Note what the codes of rows lose in one of the ways."""
        import numpy as np

        error = np.square(grid.values(grid.codes) - weights)
        self.squared[way, rows] = error.sum(1, np.float64)
        self.losses[way, rows] = losses

    @property
    def best(self) -> int:
        """The way that loses least on held-out tokens, of those that comparisons accept."""
        losses = [fsum(row) for row in self.losses]  # in any order the same
        squared = [fsum(row) for row in self.squared]
        best, most = _NEAREST, _GREATER**2
        if losses[_REFINED] < losses[best] and squared[_REFINED] <= most * squared[_NEAREST]:
            best = _REFINED
        least = min(squared[_NEAREST], squared[_SEARCHED_NEAREST])
        near = squared[_SEARCHED] <= most * least
        if near and losses[_SEARCHED] < min(losses[best], losses[_SEARCHED_NEAREST]):
            best = _SEARCHED
        return best


class Curvatures:
    """The curvatures of inputs, each computed once for all weights that read it together."""

    def __init__(self, hessians: Hessians) -> None:
        self._hessians = hessians
        self._used: WeakValueDictionary[_Input, Curvature] = WeakValueDictionary()
        self._recent: OrderedDict[_Input, Curvature] = OrderedDict()
        self._locks: dict[_Input, Lock] = {}
        self._lock = Lock()

    def of(self, rows: Rows, slab: int) -> Curvature | None:
        """Return the curvature of what a slab reads; None if it was not measured.

        Raises:
            InputError: the file of its Hessians is damaged.
        """
        hessian = hessian_of(self._hessians, rows, slab)
        if hessian is None:
            return None
        columns = _columns(rows)
        key = hessian.file, hessian.name, None if columns is None else columns.tobytes()
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            found = self._used.get(key)
            if found is None:
                found = _prepared(hessian, columns)
        with self._lock:
            self._used[key] = self._recent[key] = found
            self._recent.move_to_end(key)
            while len(self._recent) > KEPT:
                self._recent.popitem(last=False)
        return found


_Input = tuple[str, str, bytes | None]
"""File and name of a Hessian, and the order of columns, if it is another."""


def _prepared(hessian: InputHessian, columns: I64 | None) -> Curvature:
    from qwen35.codecs.refining import Curvature

    return Curvature.of(hessian, columns)


def _columns(rows: Rows) -> I64 | None:
    """Return the column of the source that each column of the output is; None if all stay."""
    import numpy as np

    own = np.arange(rows.row)
    order = rows.columns(own.astype(np.float32)[None])[0].astype(np.int64)
    return None if np.array_equal(order, own) else order
