"""INT4: the tensors of a weight in both layouts, and what they mean.

The columns of a row are split into groups with a scale s and a zero point z, which is 0 if the
codes are symmetric: W = (q - z) * s with q in -8 to 7, stored with 8 added. Scales of other tools
may be negative: those of AutoRound are where a number above zero is the largest of its group.

- compressed-tensors: ``weight_packed`` I32 [N, K / 8], column 8j + i in bits 4i of word j;
  ``weight_scale`` [N, K / group] in the checkpoint's dtype; ``weight_zero_point`` I32
  [N / 8, K / group], packed along rows; ``weight_shape`` I64 [2].
- GPTQ: ``qweight`` I32 [K / 8, N], packed along columns of W; ``scales`` F16 [K / group, N];
  ``qzeros`` I32 [K / group, N / 8], z + 8 - 1, packed along rows of W; ``g_idx`` I32 [K], the group
  of each column.

Sources: compressed-tensors 0.20 ``compressors/pack_quantized``; GPTQModel 7.7, where
``checkpoint_format`` is "gptq"; both were compared with what llama.cpp's converter decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen35.tensors import TensorSpec

__all__ = ["FORMATS", "PER_WORD", "Int4Format"]

PER_WORD = 8
"""Codes in a word of 32 bits."""


@dataclass(frozen=True)
class Int4Format:
    """A kind of INT4.

    Args:
        name: of its codec.
        group: columns that share a scale.
        symmetric: whether all zero points are 0.
        gptq: whether its layout is that of GPTQ; else compressed-tensors.
    """

    name: str
    group: int
    symmetric: bool
    gptq: bool

    @property
    def codes(self) -> str:
        """The name of the codes, after that of the module."""
        return "qweight" if self.gptq else "weight_packed"

    def parts(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors that a weight ``[N, K]`` becomes, codes and scales first.

        >>> spec = TensorSpec("a.weight", "BF16", (8, 256))
        >>> [(part.name, part.shape) for part in FORMATS["int4"].parts(spec)]
        [('a.weight_packed', (8, 32)), ('a.weight_scale', (8, 2)), ('a.weight_shape', (2,))]
        """
        module = spec.name.removesuffix("weight")
        rows, columns = spec.shape
        groups = columns // self.group
        if self.gptq:
            return (
                TensorSpec(f"{module}qweight", "I32", (columns // PER_WORD, rows)),
                TensorSpec(f"{module}scales", "F16", (groups, rows)),
                TensorSpec(f"{module}qzeros", "I32", (groups, rows // PER_WORD)),
                TensorSpec(f"{module}g_idx", "I32", (columns,)),
            )
        zeros = TensorSpec(f"{module}weight_zero_point", "I32", (rows // PER_WORD, groups))
        return (
            TensorSpec(f"{module}weight_packed", "I32", (rows, columns // PER_WORD)),
            TensorSpec(f"{module}weight_scale", spec.dtype, (rows, groups)),
            *(() if self.symmetric else (zeros,)),
            TensorSpec(f"{module}weight_shape", "I64", (2,)),
        )

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight is no matrix of whole groups and words; empty if it is one."""
        if len(spec.shape) != 2 or min(spec.shape) == 0:
            return f"is {list(spec.shape)}: not a matrix"
        rows, columns = spec.shape
        if columns % self.group:
            return f"is {list(spec.shape)}: not rows of whole groups of {self.group}"
        if rows % PER_WORD:
            return f"is {list(spec.shape)}: its rows do not fill words of {PER_WORD} codes"
        return ""


FORMATS: Mapping[str, Int4Format] = {
    row.name: row
    for row in (
        Int4Format("int4", 128, symmetric=True, gptq=False),
        Int4Format("int4-g32", 32, symmetric=True, gptq=False),
        Int4Format("int4-asym", 128, symmetric=False, gptq=False),
        Int4Format("int4-g32-asym", 32, symmetric=False, gptq=False),
        Int4Format("int4-gptq", 128, symmetric=True, gptq=True),
        Int4Format("int4-g32-gptq", 32, symmetric=True, gptq=True),
    )
}
"""The kinds of INT4, by the name of their codec."""
