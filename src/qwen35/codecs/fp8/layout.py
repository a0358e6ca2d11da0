"""Block-wise FP8 (E4M3): the two tensors a weight becomes, and how scales are chosen.

A weight ``[N, K]`` is cut into tiles of 128 x 128. Each tile has a scale, stored as bfloat16 under
``{name}_scale_inv`` (a multiplier, in spite of its name): ``W = q * scale``. Codes are the nearest
E4M3 values of ``W / scale`` with the *stored* scale, so rounding it costs nothing.

Source: the published Qwen3.5 FP8 checkpoints; E4M3 as in the OCP 8-bit floating point
specification 1.0, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwen35.errors import UsageError
from qwen35.tensors import TensorSpec

__all__ = ["BLOCK", "SCALE", "ScaleChoice", "ScaleMode", "fits", "layout"]

BLOCK = 128
"""Rows and columns of a weight that share a scale (``weight_block_size``)."""

SCALE = "_scale_inv"
"""What follows a weight's name; a multiplier: W = q * scale."""

ScaleMode = Literal["rms", "max", "percentile", "mse", "search"]


@dataclass(frozen=True)
class ScaleChoice:
    """How the scale of a tile is chosen; all but `search` as the toolkit before us documents them.

    With m the tile's largest magnitude and 448 the largest E4M3 value:

    - ``max``: m / 448.
    - ``rms``: rms(tile) * `rms_factor` / 448; what lies beyond saturates.
    - ``percentile``: the `percentile` of the magnitudes / 448; what lies beyond saturates.
    - ``mse``: a * m / 448 with the least squared error, a in `grid_size` even steps from 1 to 0.5.
    - ``search``: the bfloat16 value with the least squared error among 32 from m / 448 up to its
      double. It never clips: it moves the mantissas of the tile against the code's steps.

    Statistics of activations weigh the columns: in ``search`` their mean squares, where there are
    any, in ``rms`` and ``mse`` their largest magnitudes, as documented.

    Raises:
        UsageError: a parameter makes no sense.
    """

    mode: ScaleMode = "search"
    rms_factor: float = 3.0
    percentile: float = 99.9
    grid_size: int = 50

    def __post_init__(self) -> None:
        if self.mode not in get_args(ScaleMode):
            expected = ", ".join(get_args(ScaleMode))
            raise UsageError("--calib-mode", f"{self.mode!r}", expected=expected)
        if not 0 < self.rms_factor <= BLOCK:  # no tile of 128 x 128 peaks higher
            raise UsageError("--rms-factor", f"{self.rms_factor}", expected="0 < k <= 128")
        if not 0 < self.percentile <= 100:
            raise UsageError("--calib-percentile", f"{self.percentile}", expected="0 < p <= 100")
        if not 1 <= self.grid_size <= 10_000:
            raise UsageError("--mse-grid-size", f"{self.grid_size}", expected="1 to 10000")

    @property
    def weighted(self) -> bool:
        """Whether statistics of activations change the result."""
        return self.mode in ("rms", "mse", "search")

    def __str__(self) -> str:
        """Return the mode and the parameter that matters to it.

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
    """Whether a weight is a matrix of whole tiles; nothing else is packed as FP8.

    transformers 5.23 derives the tile from ``rows // scale rows`` and so misreads a partial one.
    """
    return len(shape) == 2 and min(shape) > 0 and all(size % BLOCK == 0 for size in shape)


def layout(spec: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Return the tensors that `spec` becomes: codes and scales.

    Args:
        spec: ``[N, K]``, both multiples of 128.

    >>> [(t.name, t.dtype, t.shape) for t in layout(TensorSpec("w", "BF16", (256, 128)))]
    [('w', 'F8_E4M3', (256, 128)), ('w_scale_inv', 'BF16', (2, 1))]
    """
    rows, columns = spec.shape
    grid = (rows // BLOCK, columns // BLOCK)
    return (
        TensorSpec(spec.name, "F8_E4M3", spec.shape),
        TensorSpec(spec.name + SCALE, "BF16", grid),
    )
