"""What is summed up over the inputs of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from qwen35.array_types import F32, F64, I64
from qwen35.errors import InputError

__all__ = ["FLOOR", "Sums", "load_sums", "save_sums"]


FLOOR = 128
"""Tokens that an expert's own statistics need to stand alone: with n of them, the mean of squares
of a bell-shaped channel is known to sqrt(2 / n), an eighth."""


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens that a matrix multiplied, or each matrix of a stack of experts.

    Args:
        squares: [slices, width] sum of squares of each input channel.
        largest: [slices, width] largest magnitude.
        tokens: [slices] tokens seen.
    """

    squares: F64
    largest: F32
    tokens: I64

    @classmethod
    def zeros(cls, slices: int, width: int) -> Self:
        """Return the sums before any token."""
        return cls(
            np.zeros((slices, width)), np.zeros((slices, width), np.float32), np.zeros(slices, "i8")
        )

    def add(self, number: int, squares: Any, largest: Any, tokens: int) -> None:
        """Add what was found in one batch, [width] each, to slice `number`."""
        self.squares[number] += squares
        np.maximum(self.largest[number], largest, out=self.largest[number])
        self.tokens[number] += tokens

    def check(self, where: str) -> None:
        """Check that every input was finite.

        Raises:
            InputError: one was not.
        """
        if not (np.isfinite(self.squares).all() and np.isfinite(self.largest).all()):
            raise InputError(
                where,
                "its input holds NaN or infinity",
                hint="the weights before it are damaged, or overflow: try --dtype float32",
            )

    def below(self, floor: int) -> list[int]:
        """Return the experts that fewer than `floor` tokens reached."""
        return [i for i, n in enumerate(self.tokens.tolist()) if n < floor] if self.stacked else []

    @property
    def stacked(self) -> bool:
        """Whether these are a stack of experts."""
        return len(self.tokens) > 1

    def filled(self, floor: int) -> Self:
        """Return the sums with experts below `floor` filled up from the average token.

        An expert with n < floor tokens gets floor - n more, each with the mean squares of all
        tokens that the layer's experts saw together, and the largest magnitudes of all of them. So
        an expert that was never reached counts as the average one does, and no weight is zero that
        is not zero for every expert.
        """
        below = self.below(floor)
        if not below:
            return self
        squares, largest, tokens = self.squares.copy(), self.largest.copy(), self.tokens.copy()
        mean = self.squares.sum(0) / max(1, int(self.tokens.sum()))
        squares[below] += (floor - tokens[below])[:, None] * mean
        largest[below] = self.largest.max(0)
        tokens[below] = floor
        return type(self)(squares, largest, tokens)

    @property
    def mean_squares(self) -> F32:
        """[slices, width] mean square of each channel; 0 where there was no token."""
        return (self.squares / np.maximum(1, self.tokens)[:, None]).astype(np.float32)


def save_sums(path: Path, sums: Mapping[str, Sums]) -> None:
    """Write the sums of a block, by the name of the weight measured, as plain arrays."""
    arrays = {f"{name}/{part}": getattr(one, part) for name, one in sums.items() for part in _PARTS}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


_PARTS = ("squares", "largest", "tokens")


def load_sums(path: Path) -> dict[str, Sums]:
    """Read what `save_sums` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
        return {name: Sums(*(arrays[f"{name}/{part}"] for part in _PARTS)) for name in names}
