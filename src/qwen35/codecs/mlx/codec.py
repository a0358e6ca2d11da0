"""The codecs of MLX: quantized weights, and others that its files hold in another form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qwen35.codecs.codec import (
    Codec,
    Encoding,
    EncodingRequest,
    LoaderModule,
    Piece,
    StoredValues,
)
from qwen35.codecs.mlx.layout import FORMATS, MlxFormat
from qwen35.errors import Finding, TensorError
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.pieces import Readable
    from qwen35.model.roles import Role

__all__ = ["MLX"]

_KINDS = ("linear", "experts", "head", "embedding", "router")


class Mlx(Codec):
    """Codes in groups of columns, as ``mx.quantize`` stores them.

    Args:
        kind: the format.
    """

    method = "mlx"
    dialect = "mlx"
    library = "mlx"
    widens = True
    per_expert = True
    packable = "linear layers, experts, routers, embeddings or the head"
    marks = ("scales",)
    endings = (".scales", ".biases")

    def __init__(self, kind: MlxFormat) -> None:
        self.kind = kind
        self.name = kind.name  # type: ignore[misc]  # one class, a codec for each row
        what = f"{kind.bits} bits" if kind.affine else kind.mode.upper()
        self.suffix = f"-{kind.name.replace('mlx', 'MLX')}"  # type: ignore[misc]
        self.meaning = f"MLX, {what} in groups of {kind.group}"  # type: ignore[misc]
        self.described = self.meaning  # type: ignore[misc]
        self.tags = ("mlx", f"{kind.bits}-bit")  # type: ignore[misc]

    @property
    def label(self) -> str:
        """The display name."""
        return "MLX" + self.name.removeprefix("mlx")

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the scales and biases, if they have the shapes of this format."""
        if not name.endswith(".weight") or tensors[name].spec.dtype != "U32":
            return None
        module, kind = name.removesuffix("weight"), self.kind
        scales = tensors.get(f"{module}scales")
        if scales is None or (scales.spec.dtype == "U8") == kind.affine:
            return None
        words, groups = tensors[name].spec.shape[-1:], scales.spec.shape[-1:]
        if not words or not groups or 32 * words[0] != groups[0] * kind.group * kind.bits:
            return None
        return [f"{module}{one}" for one in ("scales", "biases")[: 1 + kind.affine]]

    def problem(self, tensors: Mapping[str, StoredTensor], name: str) -> TensorError | None:
        """Return that the biases are missing, or None."""
        biases = f"{name.removesuffix('weight')}biases"
        if not self.kind.affine or biases in tensors:
            return None
        hint = "the checkpoint was saved incompletely: start from the original"
        return TensorError(biases, "missing", hint=hint)

    def mismatch(self, weight: Weight, expected: TensorSpec) -> TensorError | None:
        """Return why a stored weight does not match the one the config requires, or None."""
        if len(expected.shape) != 2:
            found = f"packed, though it has the shape {list(expected.shape)}"
            return TensorError(weight.main.spec.name, found, expected="a matrix, as MLX packs")
        return super().mismatch(weight, expected)

    def numel(self, weight: Weight) -> int:
        """Return the number of weights in words of codes."""
        return weight.main.spec.numel * 32 // self.kind.bits

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the decoded values."""
        from qwen35.codecs.mlx.stored import StoredMlx

        return StoredMlx(reader, weight, spec, self.kind)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of codes, scales and biases."""
        return self.kind.parts(spec)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can."""
        return self.kind.fits(spec)

    def packs(self, role: Role) -> bool:
        """Return whether MLX has a quantized layer for weights of this role."""
        tower = role.scope == "visual" and role.info.kind != "linear"
        return role.info.kind in _KINDS and not tower

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding."""
        from qwen35.codecs.mlx.stored import EncodingMlx

        return EncodingMlx(request, self.kind)

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return the section of config.json that MLX reads."""
        from qwen35.codecs.mlx.config import quantization_section

        del prefix, dtype
        return quantization_section(modules)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield contradictions between config.json and the weights."""
        from qwen35.codecs.mlx.config import section_findings

        del vision
        yield from section_findings(quantization, modules)

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        from qwen35.codecs.mlx.judge import TOLERANCE

        return TOLERANCE

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare every code with the nearest, and scales with those of ``mx.quantize``."""
        from qwen35.codecs.mlx.judge import judge
        from qwen35.codecs.mlx.stored import StoredMlx

        judge(StoredMlx(reader, weight, spec, self.kind), spec, original, result)


class _Changed(Codec):
    """An unpacked weight in another form; its tensor has the same dtype."""

    packed = False
    checks = False
    dialect = "mlx"
    library = "mlx"
    label_text: ClassVar[str]

    @property
    def label(self) -> str:
        """The display name."""
        return self.label_text

    def packs(self, role: Role) -> bool:
        """Return True: the dialect chooses it, not a recipe."""
        del role
        return True


class MlxNorm(_Changed):
    """A zero-centred norm: ``1 + w``, rounded to the dtype of the weight."""

    name = "mlx-norm"
    label_text = "1 + w"

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the weight itself."""
        return (spec,)

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the values, one less than stored."""
        from qwen35.codecs.mlx.changed import StoredNorm

        return StoredNorm(reader, weight, spec)

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start writing values, one more than given."""
        from qwen35.codecs.mlx.changed import EncodingNorm

        return EncodingNorm(request)

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare values, which must be those that are written."""
        from qwen35.codecs.mlx.changed import judge_norm

        judge_norm(reader, weight, spec, original, result)


class MlxGateNorm(_Changed):
    """The norm of linear attention in 16 bits, to which mlx-lm's own converter rounds it."""

    name = "mlx-gate-norm"
    label_text = "rounded to 16 bits"

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        return "a norm in float32, rounded as by mlx-lm's converter"

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the weight itself."""
        return (spec,)

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the values."""
        from qwen35.codecs.mlx.changed import StoredGateNorm

        return StoredGateNorm(reader, weight, spec)

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start writing values unchanged; no plan asks for it."""
        from qwen35.codecs.plain.codec import Plain

        return Plain().encode(request)

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare values, which must be the nearest of their dtype."""
        from qwen35.codecs.mlx.changed import judge_gate_norm

        judge_gate_norm(self.open(reader, weight, spec), spec, original, result)


class MlxPatches(_Changed):
    """The kernel of the patch embedding, colours last: [out, frames, height, width, colours]."""

    name = "mlx-patches"
    label_text = "colours last"

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the weight with its second dimension last."""
        out, colours, *others = spec.shape
        return (TensorSpec(spec.name, spec.dtype, (out, *others, colours)),)

    def grain(self, spec: TensorSpec) -> int:
        """Return the rows of one output."""
        return math.prod(spec.shape[1:-1])

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the values in the order of transformers."""
        from qwen35.codecs.mlx.changed import StoredPatches

        return StoredPatches(reader, weight, spec)

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start writing values in the order of MLX."""
        from qwen35.codecs.mlx.changed import EncodingPatches

        return EncodingPatches(request)

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare values, which must be equal."""
        from qwen35.codecs.plain.codec import judge_values

        judge_values(self.open(reader, weight, spec), spec, original, result)


MLX = (*(Mlx(kind) for kind in FORMATS.values()), MlxNorm(), MlxGateNorm(), MlxPatches())
"""The codecs."""
