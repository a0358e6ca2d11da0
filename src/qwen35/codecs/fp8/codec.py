"""The block-wise FP8 codec: encodes one row of tiles at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from qwen35.codecs.codec import (
    Codec,
    Encoding,
    EncodingRequest,
    Kernel,
    LoaderModule,
    Piece,
    StoredValues,
)
from qwen35.codecs.fp8.layout import BLOCK, SCALE, ScaleMode, fits, layout
from qwen35.errors import Finding, TensorError
from qwen35.tensors import FLOAT_DTYPES, StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.codecs.pieces import Readable
    from qwen35.model.model_config import ModelConfig
    from qwen35.model.roles import Role

__all__ = ["Fp8"]


class Fp8(Codec):
    """E4M3 with one scale per tile of 128 x 128."""

    name = "fp8"
    meaning = "block-wise FP8 (E4M3, 128 x 128); copied if already FP8"
    refines = True
    checks = True
    per_expert = True
    joined = True
    chooses_scales = True
    scale_modes = get_args(ScaleMode)
    banded = True
    widens = True
    packable = "linear layers or experts"
    served_inputs = "E4M3, each token in groups of 128"
    marks = endings = (SCALE,)
    method = "fp8"
    suffix = "-FP8"
    tags = ("fp8",)
    title = "block FP8"
    described = "block-wise FP8 (E4M3, blocks of 128 x 128)"
    loads = True
    library = "transformers"
    toolkit = "fp8"
    tiled = True

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts")

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the scale tensor, if present."""
        return [name + SCALE] if name + SCALE in tensors else None

    def problem(self, tensors: Mapping[str, StoredTensor], name: str) -> TensorError | None:
        """Return the problem with the tensors found by `companions`, or None."""
        dtype = tensors[name].spec.dtype
        if dtype == "F8_E4M3":
            return None
        return TensorError(name, f"{dtype} beside fp8 companions", expected="F8_E4M3")

    def mismatch(self, weight: Weight, expected: TensorSpec) -> TensorError | None:
        """Return why a stored weight does not match the one the config requires, or None."""
        spec = weight.main.spec
        if spec.shape != expected.shape:
            expected_text = f"{list(expected.shape)} by config.json"
            return TensorError(spec.name, f"shape {list(spec.shape)}", expected=expected_text)
        return _scale_mismatch(weight, expected)

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the decoded values; reads and checks the scales."""
        from qwen35.codecs.fp8.stored import StoredFp8

        return StoredFp8(reader, weight, spec)

    def check(self, reader: Readable, weight: Weight) -> None:
        """Check that all scales are finite and positive."""
        from qwen35.codecs.fp8.stored import read_scales

        read_scales(reader, weight)

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return what servers do to inputs: scales of groups as wide as a tile."""
        del reader, weight
        return self._tokens

    @cached_property
    def _tokens(self) -> InputQuantizer:
        """The same for all weights, so that products of the same inputs are known to share them."""
        from qwen35.codecs.input_quantizers import fp8_tokens

        return partial(fp8_tokens, group=BLOCK)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors of codes and scales."""
        return layout(spec)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can."""
        if fits(spec.shape):
            return ""
        odd = [f"{size} {axis}" for size, axis in _axes(spec) if size % BLOCK]
        which = f" ({' and '.join(odd)})" if odd else ""
        return f"is {list(spec.shape)}: not whole tiles of 128 x 128{which}"

    def packs(self, role: Role) -> bool:
        """Return whether weights of this role may be packed."""
        return role.info.kind in self.kinds

    def grain(self, spec: TensorSpec) -> int:
        """Return the height of a tile."""
        del spec
        return BLOCK

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding, by rows of tiles."""
        from qwen35.codecs.fp8.stored import EncodingFp8

        return EncodingFp8(request)

    def kernel(self, device: str) -> Kernel:
        """Return the device's equivalent of `qwen35.codecs.fp8.arrays.encode_rows`."""
        if device == "cpu":
            from qwen35.codecs.fp8.arrays import encode_rows

            return encode_rows
        from qwen35.codecs.fp8.triton import TritonEncoder

        return TritonEncoder(device)

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return ``quantization_config`` as in the official FP8 checkpoints."""
        from qwen35.codecs.fp8.config import quantization_config

        del prefix, dtype
        return quantization_config(modules)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield contradictions between config.json and the weights, as engines read them."""
        from qwen35.codecs.fp8.config import findings

        del vision
        yield from findings(quantization, modules)

    def tensor_parallel(
        self, config: ModelConfig, modules: Sequence[LoaderModule], ranks: int
    ) -> Iterator[Finding]:
        """Yield the weights that `ranks` GPUs cannot split into whole tiles."""
        from qwen35.codecs.fp8.config import tensor_parallel_findings

        yield from tensor_parallel_findings(config, modules, ranks)

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        from qwen35.codecs.fp8.judge import TOLERANCE

        return TOLERANCE

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare every code with the best one its scale allows."""
        from qwen35.codecs.fp8.judge import judge

        judge(reader, weight, spec, original, result)

    def too_far(self, errors: Mapping[str, float]) -> str:
        """Return why the total error exceeds rounding although no single code does."""
        from qwen35.codecs.fp8.judge import too_far

        return too_far(errors)


def _scale_mismatch(weight: Weight, expected: TensorSpec) -> TensorError | None:
    scale = weight.part(SCALE)
    shape = tuple(-(-size // BLOCK) for size in expected.shape)
    if scale is None or len(expected.shape) != 2 or scale.spec.shape != shape:
        found = list(scale.spec.shape) if scale else "none"
        expected_text = f"{list(shape)}, blocks of 128x128"
        return TensorError(weight.name + SCALE, f"shape {found}", expected=expected_text)
    if scale.spec.dtype not in FLOAT_DTYPES:
        return TensorError(scale.spec.name, f"dtype {scale.spec.dtype}", expected="BF16 or F32")
    return None


def _axes(spec: TensorSpec) -> list[tuple[int, str]]:
    """Return the sizes of a matrix with what they count; nothing for other shapes."""
    return list(zip(spec.shape, ("rows", "columns"), strict=True)) if len(spec.shape) == 2 else []
