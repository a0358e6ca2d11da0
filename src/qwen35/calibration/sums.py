"""Sums over the inputs of a weight."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np

from qwen35.array_types import F32, F64, I64, Array
from qwen35.errors import InputError

__all__ = ["FLOOR", "Sums", "load_sums", "merge_sums", "save_sums"]


FLOOR = 128
"""Tokens an expert needs before its own statistics are used alone: over n tokens, the mean square
of a normally distributed channel has a relative error of sqrt(2 / n), an eighth at 128."""


@dataclass(frozen=True)
class Sums:
    """Sums over the input tokens of a matrix, or of each matrix in a stack of experts.

    Sums and maxima, not means: they merge across batches. Squares are float64 because they
    accumulate over the whole text.

    Args:
        squares: [slices, width] sum of squares per input channel.
        largest: [slices, width] largest magnitude per input channel.
        tokens: [slices] tokens seen.
    """

    squares: F64
    largest: F32
    tokens: I64

    @classmethod
    def zeros(cls, slices: int, width: int) -> Self:
        """Return sums over no tokens."""
        return cls(
            np.zeros((slices, width)), np.zeros((slices, width), np.float32), np.zeros(slices, "i8")
        )

    def add(self, number: int, squares: Any, largest: Any, tokens: int) -> None:
        """Add the sums of one batch, [width] each, to slice `number`."""
        self.squares[number] += squares
        np.maximum(self.largest[number], largest, out=self.largest[number])
        self.tokens[number] += tokens

    def merge(self, later: Self) -> None:
        """Add the sums over later tokens."""
        self.squares[:] += later.squares
        np.maximum(self.largest, later.largest, out=self.largest)
        self.tokens[:] += later.tokens

    def check(self, subject: str) -> None:
        """Check that every input was finite.

        Raises:
            InputError: an input of `subject` was not.
        """
        if not (np.isfinite(self.squares).all() and np.isfinite(self.largest).all()):
            raise InputError(
                subject,
                "its input holds NaN or infinity",
                hint="the weights before it are damaged: qwen35 verify --depth numbers it first",
            )

    def below(self, floor: int) -> list[int]:
        """Return the experts reached by fewer than `floor` tokens."""
        return [i for i, n in enumerate(self.tokens.tolist()) if n < floor] if self.stacked else []

    @property
    def stacked(self) -> bool:
        """Whether these are a stack of experts."""
        return len(self.tokens) > 1

    def filled(self, floor: int) -> Self:
        """Return the sums with experts below `floor` topped up with average tokens.

        An expert with n < floor tokens gets floor - n more, each with the mean squares over all
        experts of the layer, and the largest magnitudes over all of them. An expert that was never
        reached thus weighs its channels like the average expert, and a channel has weight zero only
        if it is zero for every expert.
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
        """[slices, width] mean square of each channel; 0 without tokens."""
        return (self.squares / np.maximum(1, self.tokens)[:, None]).astype(np.float32)


def merge_sums(into: dict[str, Sums], later: Mapping[str, Sums]) -> None:
    """Add sums over later tokens, keyed by measured weight."""
    for name, sums in later.items():
        if name in into:
            into[name].merge(sums)
        else:
            into[name] = sums


def save_sums(path: Path, sums: Mapping[str, Sums]) -> None:
    """Write the sums of a block, keyed by measured weight, as plain arrays."""
    arrays = {f"{name}/{part}": getattr(one, part) for name, one in sums.items() for part in _PARTS}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


_PARTS = ("squares", "largest", "tokens")


def load_sums(path: Path) -> dict[str, Sums]:
    """Read a file written by `save_sums`.

    Raises:
        InputError: it is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
            return {name: _sums(*(arrays[f"{name}/{part}"] for part in _PARTS)) for name in names}
    except (ValueError, KeyError, EOFError, AttributeError, BadZipFile, zlib.error) as error:
        hint = "remove its folder to start over"
        raise InputError(str(path), "not sums of a calibration", hint=hint) from error


def _sums(squares: Array, largest: Array, tokens: Array) -> Sums:
    dtypes = [array.dtype for array in (squares, largest, tokens)]
    fits = (
        squares.ndim == 2 and squares.shape == largest.shape and tokens.shape == squares.shape[:1]
    )
    if not fits or dtypes != [np.float64, np.float32, np.int64]:
        raise ValueError("arrays that do not belong together")
    return Sums(squares, largest, tokens)
