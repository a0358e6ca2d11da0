"""Sums of x x^T while text passes a layer, the experts that need their own in groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from qwen35.calibration.hessian_inputs import (
    Matrix,
    PlannedInput,
    Tokens,
    is_held_out,
    summed_in,
)
from qwen35.calibration.hooks import InputSink

__all__ = ["GramSums", "HessianRecord"]


class GramSums:
    """Sums of x x^T over fitting and over held-out tokens.

    In float32: a sum over a batch is a product of matrices, and batches are added in the order of
    the text. These are the sums over one part of it; `HessianTotals` adds parts.

    Args:
        torch: the library.
        columns: width K of the input.
        device: where to compute.
    """

    def __init__(self, torch: Any, columns: int, device: str) -> None:
        shape = (columns, columns)
        self.sums = tuple(torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))

    def add(self, x: Any, *, held_out: bool) -> None:
        """Add tokens [n, K] of any float dtype."""
        x = x.float()
        self.sums[held_out].addmm_(x.T, x)


class HessianRecord:
    """The sums of a layer in one pass of all windows.

    Args:
        torch: the library.
        device: where to compute.
        inputs: of the layer.
        windows: returns the windows that pass at the moment.
        wanted: experts to sum up; None for the first pass, which sums up what all tokens make, and
            counts the tokens of experts.
    """

    def __init__(
        self,
        torch: Any,
        device: str,
        inputs: Mapping[str, PlannedInput],
        windows: Callable[[], range],
        wanted: Collection[Matrix] | None = None,
    ) -> None:
        self._torch, self._device, self._inputs = torch, device, inputs
        self._windows, self._wanted = windows, wanted
        self._chosen: Any = None
        self.sums: dict[Matrix, GramSums] = {}
        self.tokens: dict[Matrix, Tokens] = {}
        for name, planned in inputs.items():
            matrices = [Matrix(name), *(Matrix(name, expert) for expert in planned.experts)]
            self.tokens |= dict.fromkeys(matrices, Tokens(0, 0))

    def under(self, prefix: str) -> InputSink:
        """Return what takes the inputs of a part, whose names lack this prefix."""
        return _PrefixedInputs(self, prefix)

    def routed(self, chosen: Any) -> None:
        """Take which experts the next tokens reach, [tokens, top-k]."""
        self._chosen = chosen

    def add(self, name: str, x: Any, number: int) -> None:
        """Add what is read, [tokens, width], by a matrix or by an expert."""
        planned = self._inputs.get(name)
        if planned is None or not len(x):
            return
        expert = number if planned.experts else None
        held_out = self._held_out(x, expert)
        parts = x[~held_out], x[held_out]
        self._count(Matrix(name, expert), Tokens(*map(len, parts)))
        matrix = summed_in(name, expert, self._wanted)
        if matrix is None:
            return
        if matrix not in self.sums:
            self.sums[matrix] = GramSums(self._torch, planned.columns, self._device)
        for part, values in enumerate(parts):
            self.sums[matrix].add(values, held_out=bool(part))

    def _count(self, matrix: Matrix, tokens: Tokens) -> None:
        for one in {matrix, Matrix(matrix.name)}:
            before = self.tokens[one]
            after = Tokens(before.fit + tokens.fit, before.held_out + tokens.held_out)
            self.tokens[one] = after

    def _held_out(self, x: Any, expert: int | None) -> Any:
        """Return which rows are of held-out windows, [tokens] bool."""
        windows = self._windows()
        rows = len(x) if expert is None else len(self._chosen)
        flags = self._torch.tensor([is_held_out(window) for window in windows], device=x.device)
        flags = flags.repeat_interleave(rows // len(windows))
        if expert is None:
            return flags
        reached, _ = (self._chosen == expert).nonzero(as_tuple=True)
        return flags[reached]


class _PrefixedInputs:
    """A part of a block, such as a layer of multi-token prediction."""

    def __init__(self, record: HessianRecord, prefix: str) -> None:
        self._record, self._prefix = record, prefix

    def routed(self, chosen: Any) -> None:
        self._record.routed(chosen)

    def add(self, name: str, x: Any, number: int) -> None:
        self._record.add(self._prefix + name, x, number)
