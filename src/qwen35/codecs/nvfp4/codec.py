"""The NVFP4 codec, in the layouts of compressed-tensors and of ModelOpt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from qwen35.codecs.codec import (
    Encoding,
    EncodingRequest,
    Piece,
    StoredValues,
)
from qwen35.codecs.nvfp4.layout import COMPRESSED_TENSORS, MODELOPT, Nvfp4Layout, fits
from qwen35.codecs.served import ServedCodec
from qwen35.model.fused import scale_group
from qwen35.model.roles import role_of
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.codecs.pieces import Readable

__all__ = ["NVFP4", "Nvfp4"]


class Nvfp4(ServedCodec):
    """E2M1 codes with an E4M3 scale per block of 16 and a float32 scale of the whole.

    Args:
        name: as `Codec.name`.
        layout: the tensors of a weight.
        inputs: whether the layer's inputs are quantized too (W4A4).
    """

    checks = False
    surveys = True
    refines = True
    chooses_scales = True
    loads_experts = False  # transformers makes them too large by their scale
    scale_modes = ("search", "max")

    def __init__(self, name: str, layout: Nvfp4Layout, *, inputs: bool) -> None:
        kind = "nvfp4-a4" if inputs else "nvfp4"
        tool = layout.name
        self._layout = layout
        self.marks = (layout.whole,)  # type: ignore[misc]
        self.name, self.method, self.quantized_inputs = name, tool, inputs  # type: ignore[misc]
        self.served_inputs = "E2M1 in blocks of 16" if inputs else ""  # type: ignore[misc]
        self.layouts = {"compressed-tensors": kind, "modelopt": f"{kind}-modelopt"}  # type: ignore[misc]
        self.with_inputs = "" if inputs else name.replace("nvfp4", "nvfp4-a4")  # type: ignore[misc]
        self.suffix = "-NVFP4" if name == kind else "-NVFP4-modelopt"  # type: ignore[misc]
        scheme = "W4A4" if inputs else "W4A16"
        self.tags = ("nvfp4", "fp4", scheme.lower(), tool)  # type: ignore[misc]
        also = ", inputs too" if inputs else ""
        self.described = f"NVFP4 {scheme} (E2M1 in blocks of 16 with E4M3 scales{also})"  # type: ignore[misc]
        self.meaning = f"NVFP4 (blocks of 16{also}), as {tool} stores it"  # type: ignore[misc]

    @property
    def label(self) -> str:
        """The display name."""
        return "NVFP4"

    def weight_name(self, name: str) -> str:
        """Return the name of the weight whose codes are called `name`."""
        return f"{name.removesuffix(self._layout.codes)}weight"

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the scales, if the scale of the whole is present."""
        if not name.endswith(f".{self._layout.codes}"):
            return None
        module = name.removesuffix(self._layout.codes)
        if f"{module}{self._layout.whole}" not in tensors:
            return None
        if (f"{module}{self._layout.inputs}" in tensors) != self.quantized_inputs:
            return None
        names = (self._layout.scales, self._layout.whole, self._layout.inputs)
        return [f"{module}{one}" for one in names if f"{module}{one}" in tensors]

    def numel(self, weight: Weight) -> int:
        """Return the number of weights, two in a byte."""
        return 2 * weight.main.spec.numel

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the decoded values."""
        from qwen35.codecs.nvfp4.stored import StoredNvfp4

        return StoredNvfp4(reader, weight, spec, self._layout)

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return what servers do to inputs: blocks as in weights, with the stored scale."""
        from qwen35.codecs.input_quantizers import fp4_blocks
        from qwen35.codecs.pieces import positive

        whole = positive(reader, weight.parts[3])
        return partial(fp4_blocks, whole=whole if self._layout.divides else 1 / whole)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of codes and scales."""
        return self._layout.parts(spec, inputs=self.quantized_inputs)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can."""
        return fits(spec)

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding, row by row."""
        from qwen35.codecs.nvfp4.stored import EncodingNvfp4

        return EncodingNvfp4(request, self._layout)

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        from qwen35.codecs.nvfp4.judge import TOLERANCE

        return TOLERANCE

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare every code with the nearest, and the scales with the largest magnitudes."""
        from qwen35.codecs.nvfp4.judge import judge
        from qwen35.codecs.nvfp4.stored import StoredNvfp4

        values = StoredNvfp4(reader, weight, spec, self._layout)
        judge(values, spec, original, result, alone=scale_group(role_of(weight.name)) is None)

    def whole_scale(self, reader: Readable, weight: Weight) -> float | None:
        """Return the scale of the whole as it is stored."""
        from qwen35.codecs.nvfp4.stored import read_whole

        return float(read_whole(reader, weight))


NVFP4 = (
    Nvfp4("nvfp4", COMPRESSED_TENSORS, inputs=False),
    Nvfp4("nvfp4-a4", COMPRESSED_TENSORS, inputs=True),
    Nvfp4("nvfp4-modelopt", MODELOPT, inputs=False),
    Nvfp4("nvfp4-a4-modelopt", MODELOPT, inputs=True),
)
"""The codecs."""
