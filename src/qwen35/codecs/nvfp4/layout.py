"""NVFP4: the tensors of a weight in both layouts, and what they mean.

A weight ``[N, K]`` is split into blocks of 16 along its rows. A block has a scale s, an E4M3
number, and a whole weight has one more, in float32; codes are E2M1 numbers q. With the largest
magnitude m of the weight, and of those that engines fuse with it, s = m(block) / 6 * 2688 / m takes
the range of E4M3 up to 448, as 2688 = 6 * 448. The layouts differ in names, and in what of m they
store:

- compressed-tensors: g = 2688 / m in ``weight_global_scale``, so W = q * s / g.
- ModelOpt: m / 2688 in ``weight_scale_2``, so W = q * s * weight_scale_2.

Sources: compressed-tensors 0.20 ``compressors/nvfp4``, ``quantization/utils/helpers.py``; NVIDIA
Model-Optimizer 0.47 ``quantization/qtensor/nvfp4_tensor.py``, ``export/unified_export_hf.py``;
E2M1 as in the OCP microscaling formats specification 1.0, table 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen35.tensors import TensorSpec

__all__ = ["BLOCK", "COMPRESSED_TENSORS", "MODELOPT", "RANGE", "Nvfp4Layout", "fits"]

BLOCK = 16
"""Weights that share a scale."""

RANGE = 6 * 448
"""The largest E2M1 number times the largest E4M3 number."""


@dataclass(frozen=True)
class Nvfp4Layout:
    """How a tool calls the tensors of a module, and what it stores of the largest magnitude.

    Args:
        name: its name in ``--layout``.
        codes: two codes a byte, the first in the low bits: U8 [N, K / 2].
        scales: of the blocks: F8_E4M3 [N, K / 16].
        whole: the scale of the whole weight: F32.
        inputs: the same for the layer's inputs, if they are quantized too.
        shape: of `whole` and `inputs`.
        divides: whether `whole` divides; else it multiplies.
    """

    name: str
    codes: str
    scales: str
    whole: str
    inputs: str
    shape: tuple[int, ...]
    divides: bool

    def parts(self, spec: TensorSpec, *, inputs: bool) -> tuple[TensorSpec, ...]:
        """Return the tensors that a weight ``[N, K]`` becomes, in the order of the fields.

        >>> spec = TensorSpec("a.weight", "BF16", (2, 32))
        >>> [part.name for part in MODELOPT.parts(spec, inputs=False)]
        ['a.weight', 'a.weight_scale', 'a.weight_scale_2']
        """
        module = spec.name.removesuffix("weight")
        rows, columns = spec.shape
        parts = (
            TensorSpec(module + self.codes, "U8", (rows, columns // 2)),
            TensorSpec(module + self.scales, "F8_E4M3", (rows, columns // BLOCK)),
            TensorSpec(module + self.whole, "F32", self.shape),
        )
        return (*parts, TensorSpec(module + self.inputs, "F32", self.shape)) if inputs else parts


COMPRESSED_TENSORS = Nvfp4Layout(
    "compressed-tensors",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "input_global_scale",
    (1,),
    divides=True,
)
MODELOPT = Nvfp4Layout(
    "modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", (), divides=False
)


def fits(spec: TensorSpec) -> str:
    """Return why a weight is no matrix of whole blocks; empty if it is one."""
    if len(spec.shape) == 2 and min(spec.shape) > 0 and spec.shape[1] % BLOCK == 0:
        return ""
    return f"is {list(spec.shape)}: not rows of whole blocks of {BLOCK}"
