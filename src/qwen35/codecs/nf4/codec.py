"""The NF4 codec: blocks are encoded one by one, scales after the last block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import TYPE_CHECKING, Any

from qwen35.codecs.codec import (
    Codec,
    Encoding,
    EncodingRequest,
    Kernel,
    LoaderModule,
    Piece,
    StoredValues,
    stacked,
)
from qwen35.codecs.nf4.layout import BLOCK, PARTS, STATE, layout
from qwen35.errors import Finding, TensorError
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.pieces import Readable
    from qwen35.model.roles import Role

__all__ = ["Nf4"]


class Nf4(Codec):
    """bitsandbytes' 4-bit NormalFloat, doubly quantized."""

    name = "nf4"
    meaning = "bitsandbytes NF4; copied if already NF4"
    independent = False
    refines = True
    checks = True
    packable = "linear layers of the text model or the vision tower"
    method = "bitsandbytes"
    suffix = "-bnb-4bit"
    tags = ("bitsandbytes", "4-bit", "nf4", "qlora")
    title = "bitsandbytes NF4"
    described = "bitsandbytes NF4 (4-bit, double quantization)"
    trains = True
    load_format = "bitsandbytes"
    libraries = ("bitsandbytes", "accelerate")
    loads = True
    library = "transformers"
    toolkit = "bnb"
    in_memory = True
    marks = (STATE.rpartition(".")[2], "absmax")
    endings = tuple(f".{part}" for part in PARTS)

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the companions that are present, of the five beside the packed tensor."""
        if f"{name}.{STATE}" not in tensors and f"{name}.absmax" not in tensors:
            return None
        return [f"{name}.{part}" for part in PARTS if f"{name}.{part}" in tensors]

    def problem(self, tensors: Mapping[str, StoredTensor], name: str) -> TensorError | None:
        """Return the problem with the tensors found by `companions`, or None."""
        dtype = tensors[name].spec.dtype
        if dtype != "U8":
            return TensorError(name, f"{dtype} beside nf4 companions", expected="U8")
        required = ["absmax", "quant_map", STATE]
        if any(f"{name}.{part}" in tensors for part in ("nested_absmax", "nested_quant_map")):
            required += ["nested_absmax", "nested_quant_map"]
        missing = [part for part in required if f"{name}.{part}" not in tensors]
        if not missing:
            return None
        return TensorError(
            name,
            f"packed, but {name}.{missing[0]} is missing",
            hint="it cannot be decoded: start from the original checkpoint",
        )

    def mismatch(self, weight: Weight, expected: TensorSpec) -> TensorError | None:
        """Return why a stored weight does not match the one the config requires, or None."""
        # The packed tensor has lost the weight's shape: only its size can be compared.
        spec, nbytes = weight.main.spec, (expected.numel + 1) // 2
        if spec.numel == nbytes:
            return None
        expected_text = f"{nbytes} for shape {list(expected.shape)}"
        return TensorError(spec.name, f"{spec.numel} packed bytes", expected=expected_text)

    def numel(self, weight: Weight) -> int:
        """Return the number of weights: two per byte."""
        return 2 * weight.main.spec.numel

    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the decoded values; reads and checks state and scales."""
        from qwen35.codecs.nf4.stored import StoredNf4

        return StoredNf4(reader, weight, spec)

    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the packed tensor and its five companions."""
        return layout(spec)

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can."""
        if not spec.numel % BLOCK:
            return ""
        return f"is {list(spec.shape)}: not a multiple of {BLOCK} weights"

    def packs(self, role: Role) -> bool:
        """Return whether transformers loads weights of this role as `Linear4bit`."""
        # transformers drops the MTP layer when it loads a model.
        return role.info.kind == "linear" and role.scope != "mtp"

    def searches(self, columns: int) -> bool:
        """Return whether rows are whole blocks: plain encoding takes scales as they come."""
        return not columns % BLOCK

    def grain(self, spec: TensorSpec) -> int:
        """Return the smallest number of rows that holds whole blocks."""
        return BLOCK // gcd(BLOCK, stacked(spec)[1])

    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding: blocks piece by piece, their scales at the end."""
        from qwen35.codecs.nf4.stored import EncodingNf4

        return EncodingNf4(request)

    def kernel(self, device: str) -> Kernel:
        """Return the device's equivalent of `qwen35.codecs.nf4.arrays.encode_blocks`."""
        if device == "cpu":
            from qwen35.codecs.nf4.arrays import encode_blocks

            return encode_blocks
        from qwen35.codecs.nf4.torch import TorchEncoder

        return TorchEncoder(device)

    def memory(self, spec: TensorSpec) -> int:
        """Return the size of the scales in float32, plus temporaries of their quantization."""
        return spec.numel // BLOCK * 4 * 8

    def refining_memory(self, spec: TensorSpec) -> int:
        """Return the size of the weight and its codes, which wait for the last scale."""
        return spec.nbytes + spec.numel // 2

    def decoding_memory(self, spec: TensorSpec) -> int:
        """Return the size of the scales: stored, as float32, and a temporary."""
        return spec.numel // BLOCK * 16

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers writes it, with all skipped modules."""
        from qwen35.codecs.nf4.config import quantization_config

        return quantization_config(modules, prefix, dtype)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield contradictions between config.json and the weights, as transformers reads them."""
        from qwen35.codecs.nf4.config import findings

        yield from findings(quantization, modules, vision=vision)

    def notes(self, modules: Sequence[LoaderModule], dtype: str) -> Iterator[str]:
        """Yield the share of parameters left unpacked because no engine loads packed experts."""
        plain = [
            module.spec.numel
            for module in modules
            if module.role.info.kind == "experts" and module.codec == "plain"
        ]
        if plain:
            share = sum(plain) / sum(module.spec.numel for module in modules)
            yield (
                f"experts stay in {dtype}: {share:.1%} of all parameters, because "
                "transformers cannot load them packed"
            )

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses."""
        from qwen35.codecs.nf4.judge import TOLERANCE

        return TOLERANCE

    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare codes and scales with those computed from the original."""
        from qwen35.codecs.nf4.judge import judge

        judge(reader, weight, spec, original, result)
