"""The ggml types behind the codec protocol: one codec per type, encoded by whole rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from qwen35.codecs.codec import Codec, Encoding, EncodingRequest, Piece, stacked
from qwen35.codecs.ggml.types import FLOATS, GGML_TYPES, NEEDS_IMATRIX, REFINED, GgmlType
from qwen35.record_class import record
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.ggml.stored import StoredGgml
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.codecs.pieces import Readable
    from qwen35.model.roles import Role

__all__ = ["GGML", "BlockSpec", "Ggml", "ScaledGgml", "codec_name"]


_SUPERBLOCK, _BLOCK = 256, 32
"""Inputs that share a scale."""

_FULL = 4
"""Bytes of a float that is not rounded."""


@cache
def _eight_bits(*, whole: bool) -> InputQuantizer:
    """Return the rounding of inputs in blocks: one object for all types that share it."""
    from qwen35.codecs.input_quantizers import eight_bits

    return partial(eight_bits, block=_SUPERBLOCK if whole else _BLOCK, half=not whole)


def codec_name(kind: str) -> str:
    """Return the registry name of a ggml type; the prefix avoids clashes (``nvfp4``, ``bf16``)."""
    return f"ggml:{kind}"


@record
class BlockSpec(TensorSpec):
    """A tensor of a GGUF file: its dtype is a ggml type, its rows are whole blocks.

    >>> BlockSpec("blk.0.ffn_up.weight", "q4_K", (4, 256)).nbytes
    576
    """

    def __post_init__(self) -> None:
        assert self.dtype in GGML_TYPES, self.dtype
        object.__setattr__(self, "nbytes", GGML_TYPES[self.dtype].size(self.shape))


class Ggml(Codec):
    """The codec of one ggml type.

    Args:
        kind: the type's row in the table.
    """

    spared: ClassVar[frozenset[str]] = frozenset()
    container = "gguf"
    suffix = "-GGUF"
    tags = ("gguf",)
    described = "GGUF"
    library = "gguf"
    libraries = ("llama_cpp",)

    def __init__(self, kind: GgmlType) -> None:
        self.kind = kind
        self.name = codec_name(kind.name)  # type: ignore[misc]  # one class, a codec for each row
        self.packed = kind.name not in FLOATS  # type: ignore[misc]
        self.refines = kind.name in REFINED  # type: ignore[misc]
        self.needs_importance = kind.name in NEEDS_IMATRIX  # type: ignore[misc]

    @property
    def label(self) -> str:
        """The name users know."""
        return self.kind.name

    @property
    def op(self) -> str:
        """The operation name in plans."""
        return self.kind.name

    @property
    def tolerance(self) -> str:
        """How far off blocks and tensors of this type may be before a comparison sees it."""
        from qwen35.codecs.ggml.judge import tolerance

        return tolerance(self.kind)

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str]:
        """Return the tensors beside the one called `name`: mostly none."""
        del tensors, name
        return []

    def numel(self, weight: Weight) -> int:
        """Return the number of stored elements."""
        return weight.main.spec.nbytes // self.kind.nbytes * self.kind.block

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredGgml:
        """Return a reader that decodes with the `gguf` library."""
        from qwen35.codecs.ggml.stored import StoredGgml

        del spec
        return StoredGgml(reader, weight, self.kind)

    def check(self, reader: Readable, weight: Weight) -> None:
        """Decode a weight that is copied: its scales must be finite."""
        import numpy as np

        from qwen35.codecs import pieces

        spec = TensorSpec(weight.name, "F32", weight.main.spec.shape)
        values, numel = self.open(reader, weight, spec), self.numel(weight)
        buffer = np.empty(min(pieces.PIECE, numel), np.float32)
        for first in range(0, numel, pieces.PIECE):
            values.read_into(first, buffer[: numel - first])

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return how llama.cpp on CPUs rounds inputs that it multiplies with this type."""
        del reader, weight
        return self.input_rounding

    @cached_property
    def input_rounding(self) -> InputQuantizer:
        """How llama.cpp on CPUs rounds inputs that it multiplies with this type.

        Source: `vec_dot_type` in ``ggml/src/ggml-cpu/ggml-cpu.c`` at 0c1e5709: q8_K for types with
        blocks of 256, q8_0 or q8_1, with the same values, for other quantized ones, and the type
        itself for floats.
        """
        from qwen35.codecs.input_quantizers import sixteen_bits

        if self.packed:
            return _eight_bits(whole=self.kind.block == _SUPERBLOCK)
        if self.kind.nbytes == _FULL:
            return lambda x: x
        return partial(sixteen_bits, brain=self.kind.name == "bf16")

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensor in this type."""
        return (BlockSpec(spec.name, self.kind.name, spec.shape),)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape does not fit; empty if it does."""
        row = stacked(spec)[1]
        return f"rows of {row} are not whole blocks of {self.kind.block}" * (
            row % self.kind.block > 0
        )

    def packs(self, role: Role) -> bool:
        """Allow every role: in GGUF files, recipes choose types by tensor name."""
        del role
        return True

    def encode(self, request: EncodingRequest) -> Encoding:
        """Return an encoder for rows."""
        from qwen35.codecs.ggml.stored import EncodingGgml

        return EncodingGgml(request, self.kind)

    def memory(self, spec: TensorSpec) -> int:
        """Return the bytes that rows longer than a piece take beyond that piece."""
        from qwen35.codecs import pieces

        return max(0, stacked(spec)[1] - pieces.PIECE) * _ROW_BYTES

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare floats exactly after rounding, and blocks within the bounds of their type."""
        from qwen35.codecs.ggml.judge import judge

        values = self.open(reader, weight, spec)
        judge(values, self.kind, original, result, values.grid)


_ROW_BYTES = 24
"""Bytes per element of a row: stored, widened to float32, masked and encoded."""


class ScaledGgml(Ggml):
    """A type whose values are relative to a scale in a tensor of its own, as in NVFP4.

    ``X.weight`` has ``X.scale`` beside it, F32 [1], or one for each expert of a stack. llama.cpp
    multiplies products by it (``src/llama-model.cpp``, `build_lora_mm` of ``llama-graph.cpp``).
    ``X.input_scale``, which other tools write, is for activations.
    """

    surveys = True

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str]:
        """Return the scales that there are; without one, values are relative to 1."""
        names = (_beside(name, "scale"), _beside(name, "input_scale"))
        return [one for one in names if one in tensors]

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensor in this type, and its scales."""
        scales = BlockSpec(_beside(spec.name, "scale"), "f32", (prod(spec.shape[:-2]),))
        return (*super().layout(spec), scales)

    def packs(self, role: Role) -> bool:
        """Return whether llama.cpp reads a scale for weights of this role.

        It looks the rows of an embedding up without one, even where they are the head too. Where it
        does not load MTP layers, the default, it takes their scales for tensors that do not belong
        in the file, and refuses it.
        """
        return role.info.kind != "embedding" and role.scope != "mtp"

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredGgml:
        """Return a reader that decodes with the `gguf` library and multiplies by the scales."""
        from qwen35.codecs.ggml.scaled import StoredScaled

        return StoredScaled(reader, weight, self.kind, self.layout(spec)[1])

    def encode(self, request: EncodingRequest) -> Encoding:
        """Return an encoder of rows relative to the scale of their matrix."""
        from qwen35.codecs.ggml.scaled import EncodingScaled

        return EncodingScaled(request, self.kind)


def _beside(name: str, suffix: str) -> str:
    return f"{name.removesuffix('.weight')}.{suffix}"


_CODECS = {"nvfp4": ScaledGgml}

GGML: tuple[Any, ...] = tuple(_CODECS.get(kind.name, Ggml)(kind) for kind in GGML_TYPES.values())
"""One codec per ggml type, including the types that are only read."""
