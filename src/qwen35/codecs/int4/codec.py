"""The INT4 codecs: groups of 128 or 32, in the layouts of compressed-tensors and of GPTQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qwen35.codecs.codec import (
    Encoding,
    EncodingRequest,
    Piece,
    StoredValues,
)
from qwen35.codecs.int4.layout import FORMATS, PER_WORD, Int4Format
from qwen35.codecs.served import ServedCodec
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.pieces import Readable

__all__ = ["INT4", "Int4"]


class Int4(ServedCodec):
    """Integers of four bits with a scale per group of columns.

    Args:
        kind: the row of the table.
    """

    refines = True
    chooses_scales = True
    scale_modes = ("search", "max")

    def __init__(self, kind: Int4Format) -> None:
        self.kind = kind
        plain = kind.name.removesuffix("-gptq")
        tool = "gptq" if kind.gptq else "compressed-tensors"
        self.name = kind.name  # type: ignore[misc]  # one class, a codec for each row
        self.method = tool  # type: ignore[misc]
        self.endings = (".g_idx" if kind.gptq else ".weight_shape",)  # type: ignore[misc]
        self.marks = ("g_idx" if kind.gptq else "weight_shape",)  # type: ignore[misc]
        self.suffix = "-GPTQ-Int4" if kind.gptq else "-W4A16"  # type: ignore[misc]
        self.independent = not kind.gptq  # type: ignore[misc]
        zero = "symmetric" if kind.symmetric else "with zero points"
        self.meaning = f"INT4, groups of {kind.group}, {zero}, as {tool} stores it"  # type: ignore[misc]
        self.tags = ("int4", "w4a16", tool)  # type: ignore[misc]
        self.described = f"INT4 W4A16 (groups of {kind.group}, {zero})"  # type: ignore[misc]
        self.layouts = {"compressed-tensors": plain}  # type: ignore[misc]
        if f"{plain}-gptq" in FORMATS:
            self.layouts["gptq"] = f"{plain}-gptq"

    @property
    def label(self) -> str:
        """The display name."""
        return "INT4"

    def weight_name(self, name: str) -> str:
        """Return the name of the weight whose codes are called `name`."""
        return f"{name.removesuffix(self.kind.codes)}weight"

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the scales and the other parts, if they are of this kind."""
        if not name.endswith(f".{self.kind.codes}"):
            return None
        module = name.removesuffix(self.kind.codes)
        beside = [
            f"{module}{end}" for end in _ENDINGS[self.kind.gptq] if f"{module}{end}" in tensors
        ]
        return beside if self._is_ours(tensors, name, module) else None

    def _is_ours(self, tensors: Mapping[str, StoredTensor], name: str, module: str) -> bool:
        kind = self.kind
        scales = tensors.get(f"{module}{'scales' if kind.gptq else 'weight_scale'}")
        last = f"{module}{'g_idx' if kind.gptq else 'weight_shape'}"
        codes = tensors[name].spec
        if scales is None or last not in tensors or not codes.shape or not scales.spec.shape:
            return False
        axis = 0 if kind.gptq else -1
        columns, groups = codes.shape[axis] * PER_WORD, scales.spec.shape[axis]
        zeros = f"{module}weight_zero_point" in tensors
        return columns == groups * kind.group and (kind.gptq or zeros != kind.symmetric)

    def numel(self, weight: Weight) -> int:
        """Return the number of weights, eight in a word."""
        return PER_WORD * weight.main.spec.numel

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the decoded values."""
        from qwen35.codecs.int4.stored import open_int4

        return open_int4(reader, weight, spec, self.kind)

    def check(self, reader: Readable, weight: Weight) -> None:
        """Check the shape that is stored beside the codes."""
        from qwen35.codecs.int4.stored import check_shape

        if not self.kind.gptq:
            check_shape(reader, weight)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of codes, scales and the rest."""
        return self.kind.parts(spec)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can."""
        return self.kind.fits(spec)

    def grain(self, spec: TensorSpec) -> int:
        """Return the rows of a word of zero points."""
        del spec
        return PER_WORD

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding."""
        from qwen35.codecs.int4.stored import EncodingGptq, EncodingInt4

        return (EncodingGptq if self.kind.gptq else EncodingInt4)(request, self.kind)

    def memory(self, spec: TensorSpec) -> int:
        """Return the bytes of all codes, in the layout that is transposed."""
        return spec.numel // 2 if self.kind.gptq else 0

    def decoding_memory(self, spec: TensorSpec) -> int:
        """Return the bytes of all codes, in the layout that is transposed."""
        return self.memory(spec)

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        from qwen35.codecs.int4.judge import TOLERANCE

        return TOLERANCE

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare every code with the nearest, and scales with the extremes of their groups."""
        from qwen35.codecs.int4.judge import judge
        from qwen35.codecs.int4.stored import open_int4

        judge(open_int4(reader, weight, spec, self.kind), spec, original, result)

    def misread(
        self, reader: Readable, weight: Weight, quantization: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield which of GPTQ's parts engines ignore, although they matter."""
        from qwen35.codecs.int4.stored import ignored_parts

        if self.kind.gptq:
            yield from ignored_parts(reader, weight, quantization, self.kind)


_ENDINGS = {
    False: ("weight_scale", "weight_zero_point", "weight_shape"),
    True: ("scales", "qzeros", "g_idx"),
}

INT4 = tuple(Int4(kind) for kind in FORMATS.values())
"""The codecs."""
