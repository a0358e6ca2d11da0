"""The tensors of a weight that MLX has quantized, and what they mean.

A weight ``[N, K]`` is split into groups of columns. Codes of `bits` bits follow each other in a row
without gaps, the first in the lowest bits, in words of 32 bits. With a code q of a group:

- affine: W = s * q + b; s and b are in the dtype of the weight.
- nvfp4: W = E2M1(q) * s; s is an E4M3 number. There is no scale of the whole.
- mxfp4, mxfp8: W = E2M1(q) * 2**(s - 127), or E4M3(q) in place of E2M1(q).

Source: mlx 0.32 ``mlx/backend/cpu/quantized.cpp``, ``mlx/ops.cpp`` (``quantize``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from qwen35.tensors import TensorSpec

__all__ = ["FORMATS", "MlxFormat", "format_of"]

_WORD = 32


@dataclass(frozen=True)
class MlxFormat:
    """One way in which ``mx.quantize`` stores a weight.

    Args:
        name: of the codec.
        mode: as config.json says.
        bits: of a code.
        group: columns that share a scale.
    """

    name: str
    mode: str
    bits: int
    group: int

    @property
    def affine(self) -> bool:
        """Whether codes are integers, with a scale and a bias."""
        return self.mode == "affine"

    def parts(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors that a weight ``[N, K]`` becomes.

        >>> spec = TensorSpec("a.weight", "BF16", (2, 128))
        >>> [part.name for part in FORMATS["mlx-4bit"].parts(spec)]
        ['a.weight', 'a.scales', 'a.biases']
        """
        module = spec.name.removesuffix("weight")
        rows, columns = spec.shape
        groups = (rows, columns // self.group)
        codes = TensorSpec(spec.name, "U32", (rows, columns * self.bits // _WORD))
        if not self.affine:
            return codes, TensorSpec(f"{module}scales", "U8", groups)
        own = ("scales", "biases")
        return codes, *(TensorSpec(f"{module}{name}", spec.dtype, groups) for name in own)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight is no matrix of whole groups; empty if it is one."""
        if len(spec.shape) == 2 and min(spec.shape) > 0 and spec.shape[1] % self.group == 0:
            return ""
        return f"is {list(spec.shape)}: not rows of whole groups of {self.group}"

    def settings(self) -> dict[str, int | str]:
        """Return what config.json says about it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


def _formats() -> dict[str, MlxFormat]:
    """Return all formats by name; those without a group in the name have MLX's default."""
    rows = [
        MlxFormat("mlx-mxfp4", "mxfp4", 4, 32),
        MlxFormat("mlx-nvfp4", "nvfp4", 4, 16),
        MlxFormat("mlx-mxfp8", "mxfp8", 8, 32),
    ]
    for group, bits in product((64, 32, 128), (4, 8, 2, 3, 5, 6)):
        ending = "" if group == 64 else f"-g{group}"
        rows.append(MlxFormat(f"mlx-{bits}bit{ending}", "affine", bits, group))
    return {row.name: row for row in rows}


FORMATS = _formats()
"""All formats by name."""

_BY_SETTINGS = {(row.mode, row.bits, row.group): row for row in FORMATS.values()}


def format_of(mode: object, bits: object, group: object) -> MlxFormat | None:
    """Return the format that config.json describes; None if there is none of this kind."""
    if type(bits) is not int or type(group) is not int or not isinstance(mode, str):
        return None
    return _BY_SETTINGS.get((mode, bits, group))
