"""The codecs of FP8 with a scale per row (FP8-dynamic), or one per weight (ModelOpt)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from qwen35.codecs.codec import (
    Encoding,
    EncodingRequest,
    Piece,
    StoredValues,
)
from qwen35.codecs.served import ServedCodec
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.codecs.pieces import Readable

__all__ = ["Fp8Channel", "Fp8Tensor"]

_SCALE = "_scale"
_COLUMNS = 16
"""Columns are encoded so many at a time."""


class Fp8Channel(ServedCodec):
    """E4M3 with one scale per row: W = q * scale, the scale in the checkpoint's dtype.

    Inputs are quantized per token when the model runs. Source: compressed-tensors 0.20
    ``compressors/naive_quantized``.
    """

    name = "fp8-channel"
    meaning = "FP8 (E4M3) with a scale per row, as compressed-tensors stores it"
    refines = True
    method = "compressed-tensors"
    suffix = "-FP8-dynamic"
    tags = ("fp8", "compressed-tensors")
    marks = (_SCALE,)
    served_inputs = "E4M3, each token"
    described = "FP8 per channel (E4M3, inputs quantized per token)"
    layouts: ClassVar[Mapping[str, str]] = {
        "compressed-tensors": "fp8-channel",
        "modelopt": "fp8-modelopt",
    }

    @property
    def label(self) -> str:
        """The display name."""
        return "FP8 per channel"

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the scales, if there is one for each row."""
        scale = tensors.get(f"{name}{_SCALE}")
        spec = tensors[name].spec
        if scale is None or spec.dtype != "F8_E4M3" or len(spec.shape) != 2:
            return None
        return [f"{name}{_SCALE}"] if scale.spec.shape == (spec.shape[0], 1) else None

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the decoded values; reads and checks the scales."""
        from qwen35.codecs.fp8_channel.stored import StoredChannels

        return StoredChannels(reader, weight, spec)

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return what servers do to inputs: a scale for each token."""
        from qwen35.codecs.input_quantizers import fp8_tokens

        del reader, weight
        return fp8_tokens

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of codes and scales."""
        scales = TensorSpec(f"{spec.name}{_SCALE}", spec.dtype, (spec.shape[0], 1))
        return (TensorSpec(spec.name, "F8_E4M3", spec.shape), scales)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can."""
        if len(spec.shape) == 2 and min(spec.shape) > 0 and spec.shape[1] % _COLUMNS == 0:
            return ""
        return f"is {list(spec.shape)}: not rows of a multiple of {_COLUMNS}"

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding, row by row."""
        from qwen35.codecs.fp8_channel.stored import EncodingChannels, EncodingTensor

        return (EncodingTensor if self.surveys else EncodingChannels)(request)

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        from qwen35.codecs.fp8_channel.stored import TOLERANCE

        return TOLERANCE

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare every code with its value, and scales with the largest magnitudes."""
        from qwen35.codecs.fp8_channel.stored import StoredChannels, judge

        values = StoredChannels(reader, weight, spec)
        judge(values, spec, original, result, per_row=not self.surveys)


class Fp8Tensor(Fp8Channel):
    """E4M3 with one scale for the whole weight, and one for the layer's inputs, as in ModelOpt.

    W = q * scale, both scales in float32. Source: NVIDIA Model-Optimizer 0.47
    ``export/unified_export_hf.py``, where an algorithm is called FP8.
    """

    name = "fp8-modelopt"
    meaning = "FP8 (E4M3) with a scale per weight and one of its inputs, as modelopt stores it"
    surveys = True
    quantized_inputs = True
    served_inputs = "E4M3 with a stored scale"
    method = "modelopt"
    suffix = "-FP8-modelopt"
    tags = ("fp8", "modelopt")
    described = "FP8 per tensor (E4M3, inputs too)"

    @property
    def label(self) -> str:
        """The display name."""
        return "FP8 per tensor"

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the scales, if there is one number for all and one for the inputs."""
        scale = tensors.get(f"{name}{_SCALE}")
        spec = tensors[name].spec
        if scale is None or spec.dtype != "F8_E4M3" or len(spec.shape) != 2:
            return None
        parts = [out.name for out in self.layout(TensorSpec(name, "BF16", spec.shape))[1:]]
        return parts if scale.spec.shape == () and parts[1] in tensors else None

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return what servers do to inputs: the stored scale."""
        from qwen35.codecs.input_quantizers import fp8_fixed
        from qwen35.codecs.pieces import positive

        return partial(fp8_fixed, scale=positive(reader, weight.parts[2]))

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of codes and the two scales."""
        return (
            TensorSpec(spec.name, "F8_E4M3", spec.shape),
            TensorSpec(f"{spec.name}{_SCALE}", "F32", ()),
            TensorSpec(f"{spec.name.removesuffix('weight')}input_scale", "F32", ()),
        )

    def whole_scale(self, reader: Readable, weight: Weight) -> float | None:
        """Return the scale, which weights share that engines fuse."""
        from qwen35.codecs.fp8_channel.stored import StoredChannels

        return float(StoredChannels(reader, weight, weight.main.spec).scales[0])
