"""The types of ggml as the protocol asks for them: one codec each, whole rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qwen35.codecs.codec import Codec, Encoding, EncodingRequest, Piece, StoredValues, stacked
from qwen35.codecs.ggml.types import FLOATS, GGML_TYPES, NEEDS_IMATRIX, GgmlType
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.pieces import Readable
    from qwen35.model.roles import Role

__all__ = ["GGML", "BlockSpec", "Ggml", "codec_name"]


def codec_name(kind: str) -> str:
    """Return what the registry calls a type of ggml, which shares names with other formats."""
    return f"ggml:{kind}"


@dataclass(frozen=True, slots=True)
class BlockSpec(TensorSpec):
    """A tensor of a GGUF file: its dtype is a type of ggml, its rows hold whole blocks.

    >>> BlockSpec("blk.0.ffn_up.weight", "q4_K", (4, 256)).nbytes
    576
    """

    def __post_init__(self) -> None:
        assert self.dtype in GGML_TYPES, self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return GGML_TYPES[self.dtype].size(self.shape)


class Ggml(Codec):
    """One type of ggml.

    Args:
        kind: its row in the table.
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
        self.needs_importance = kind.name in NEEDS_IMATRIX  # type: ignore[misc]

    @property
    def label(self) -> str:
        """What people call it."""
        return self.kind.name

    @property
    def op(self) -> str:
        """What a plan says is done."""
        return self.kind.name

    @property
    def tolerance(self) -> str:
        """How far off blocks and tensors of this type may be before a comparison sees it."""
        from qwen35.codecs.ggml.judge import tolerance

        return tolerance(self.kind)

    def numel(self, weight: Weight) -> int:
        """Return how many weights are stored."""
        return weight.main.spec.nbytes // self.kind.nbytes * self.kind.block

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Return the values, decoded by the `gguf` library."""
        from qwen35.codecs.ggml.stored import StoredGgml

        del spec
        return StoredGgml(reader, weight, self.kind)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensor in this type."""
        return (BlockSpec(spec.name, self.kind.name, spec.shape),)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be held; nothing if it can."""
        row = stacked(spec)[1]
        return f"rows of {row} are not whole blocks of {self.kind.block}" * (
            row % self.kind.block > 0
        )

    def packs(self, role: Role) -> bool:
        """Whether weights of this role may be held so; names decide in GGUF files."""
        del role
        return True

    def encode(self, order: EncodingRequest) -> Encoding:
        """Return what encodes rows."""
        from qwen35.codecs.ggml.stored import EncodingGgml

        return EncodingGgml(order, self.kind)

    def memory(self, spec: TensorSpec) -> int:
        """Return bytes that encoding a weight takes, beside its piece: a row longer than that."""
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
        """Compare floats after rounding, and blocks within the bounds of their type."""
        from qwen35.codecs.ggml.judge import judge

        judge(self.open(reader, weight, spec), self.kind, original, result)


_ROW_BYTES = 24
"""Bytes for each element of a row: stored, widened, masked, encoded."""

GGML: tuple[Any, ...] = tuple(Ggml(kind) for kind in GGML_TYPES.values())
"""A codec for each type of ggml, those included that are only read."""
