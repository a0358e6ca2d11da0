"""Block-wise FP8 (E4M3): the two tensors per weight, and how to choose scales.

A weight ``[N, K]`` is split into tiles of 128 x 128. Each tile has a scale, stored as bfloat16 in
``{name}_scale_inv`` (a multiplier, despite its name): ``W = q * scale``. Codes are the nearest E4M3
values of ``W / scale`` with the *stored* scale, so rounding the scale costs nothing.

Source: the published Qwen3.5 FP8 checkpoints; E4M3 as in the OCP 8-bit floating point
specification 1.0, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from qwen35.errors import UsageError
from qwen35.tensors import TensorSpec

__all__ = ["BLOCK", "SCALE", "ScaleChoice", "ScaleMode", "fits", "layout"]

BLOCK = 128
"""Rows and columns of a weight that share a scale (``weight_block_size``)."""

SCALE = "_scale_inv"
"""Suffix of the scale tensor's name; a multiplier: W = q * scale."""

ScaleMode = Literal["rms", "max", "percentile", "mse", "search"]


@dataclass(frozen=True)
class ScaleChoice:
    """How to choose the scale of a tile; all modes but `search` follow this package's predecessor.

    With m the tile's largest magnitude and 448 the largest E4M3 value:

    - ``max``: m / 448.
    - ``rms``: rms(tile) * `rms_factor` / 448; larger values saturate.
    - ``percentile``: the `percentile` of the magnitudes / 448; larger values saturate.
    - ``mse``: a * m / 448 with the least squared error, for `grid_size` even steps a from 1 to 0.5.
    - ``search``: of 32 bfloat16 values between m / 448 and twice that, the one with the least
      squared error. It never clips: it shifts the tile's mantissas relative to the E4M3 steps.

    Activation statistics weight the columns: mean squares, if available, in ``search``, largest
    magnitudes in ``rms`` and ``mse``.

    Raises:
        UsageError: a parameter is out of range.
    """

    mode: ScaleMode = "search"
    rms_factor: float = 3.0
    percentile: float = 99.9
    grid_size: int = 50

    def __post_init__(self) -> None:
        if self.mode not in get_args(ScaleMode):
            expected = ", ".join(get_args(ScaleMode))
            raise UsageError("--calib-mode", f"{self.mode!r}", expected=expected)
        if not 0 < self.rms_factor <= BLOCK:  # peak / rms of a 128 x 128 tile is at most 128
            raise UsageError("--rms-factor", f"{self.rms_factor}", expected="0 < k <= 128")
        if not 0 < self.percentile <= 100:
            raise UsageError("--calib-percentile", f"{self.percentile}", expected="0 < p <= 100")
        if not 1 <= self.grid_size <= 10_000:
            raise UsageError("--mse-grid-size", f"{self.grid_size}", expected="1 to 10000")

    @property
    def weighted(self) -> bool:
        """True if activation statistics affect the result."""
        return self.mode in ("rms", "mse", "search")

    def __str__(self) -> str:
        """Return the mode with its parameter.

        >>> str(ScaleChoice("rms")), str(ScaleChoice("max"))
        ('rms(k=3.0)', 'max')
        """
        parameter = {
            "rms": f"(k={self.rms_factor})",
            "percentile": f"(p={self.percentile})",
            "mse": f"(grid={self.grid_size})",
        }
        return self.mode + parameter.get(self.mode, "")


def fits(shape: tuple[int, ...]) -> bool:
    """Return whether a weight is a matrix of whole tiles; nothing else is packed as FP8.

    transformers 5.23 derives the tile size from ``rows // scale rows`` and misreads partial tiles.
    """
    return len(shape) == 2 and min(shape) > 0 and all(size % BLOCK == 0 for size in shape)


def layout(spec: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Return the tensors that `spec` becomes: codes and scales.

    Args:
        spec: ``[N, K]``, both multiples of 128.

    >>> [(t.name, t.dtype, t.shape) for t in layout(TensorSpec("w", "BF16", (256, 128)))]
    [('w', 'F8_E4M3', (256, 128)), ('w_scale_inv', 'BF16', (2, 1))]
    """
    return (
        TensorSpec(spec.name, "F8_E4M3", spec.shape),
        TensorSpec(spec.name + SCALE, "BF16", _grid(spec.shape)),
    )


@cache
def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales; one object for all experts."""
    rows, columns = shape
    return rows // BLOCK, columns // BLOCK
