"""The file types with which a model fits a memory, beside what llama.cpp allocates for a context.

Source of the cache and the state: llama.cpp 0c1e5709, ``src/llama-kv-cache.cpp``,
``src/llama-memory-recurrent.cpp`` and `llama_hparams` (`n_embd_r`, `n_embd_s`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qwen35.display import size, size_rounded_up
from qwen35.errors import UsageError
from qwen35.model.model_config import ModelConfig
from qwen35.planning.gguf_files.gguf_plan import chooser_of, files_of
from qwen35.planning.gguf_files.mixes import FILE_TYPES, FileType
from qwen35.planning.gguf_files.type_choice import Kinds
from qwen35.planning.output_plan import Plan
from qwen35.table import table_lines

__all__ = ["MEASURED", "FittingType", "MemoryFit", "context_memory", "fit_text", "memory_fit"]

MEASURED = ("F32", "Q8_0")
"""The types that a plan needs for `memory_fit`: the head of either kind of file."""

NOT_COUNTED = "compute buffers of llama.cpp, which depend on the batch and the device"

_CONTEXT_STEP = 256
"""llama.cpp rounds a context up to a multiple of this."""


@dataclass(frozen=True)
class FittingType:
    """One file type.

    Args:
        type: its name.
        file_bytes: size of its file.
        total_bytes: the same, with cache, state and projector.
        needs_imatrix: whether it needs an importance matrix that was not given, or that lacks
            tensors; then the size is without the file's keys about the matrix (below 1 kB).
    """

    type: str
    file_bytes: int
    total_bytes: int
    needs_imatrix: bool


@dataclass(frozen=True)
class MemoryFit:
    """The file types that fit.

    Args:
        model: the model's name.
        memory: the limit in bytes.
        context: tokens, as llama.cpp rounds them.
        kv_cache: bytes of the keys and values of full attention, in F16.
        state: bytes of the states of linear attention, in F32.
        projector: size of the multimodal projector's file; None without one.
        types: largest first.
        notes: of the plan.
    """

    model: str
    memory: int
    context: int
    kv_cache: int
    state: int
    projector: int | None
    types: tuple[FittingType, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        largest = self.types[0]
        fits = f"{largest.type} is the largest that fits, {size(largest.total_bytes)}"
        return f"<MemoryFit of {self.model} in {size(self.memory)}: {fits}>"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        values = asdict(self)
        types = [asdict(row) for row in self.types]
        return {
            **values,
            "not_counted": NOT_COUNTED,
            "largest": self.types[0].type,
            "types": types,
            "notes": list(self.notes),
        }


def context_memory(config: ModelConfig, context: int) -> tuple[int, int]:
    """Return the bytes that llama.cpp allocates for one sequence: cache of F16, state of F32.

    MTP layers have no part in it, for llama.cpp does not load them by default.
    """
    dims, layers = config.dims, config.layer_types
    keys_and_values = 2 * dims["key_value"]
    cache = 2 * layers.count("full_attention") * context * keys_and_values
    convolution = (dims["conv"] - 1) * dims["linear_qkv"]
    state = dims["linear_head"] * dims["linear_value"]
    return cache, 4 * layers.count("linear_attention") * (convolution + state)


def memory_fit(plan: Plan, memory: int, context: int) -> MemoryFit:
    """Return the file types that fit `memory` bytes with a context of at least `context` tokens.

    Args:
        plan: of the types `MEASURED`, perhaps with a projector.
        memory: limit in bytes.
        context: tokens.

    Raises:
        UsageError: none fits, a rule's type does not fit the model, or the context is not positive.
    """
    if context < 1:
        raise UsageError("context", str(context), expected="a number of tokens from 1")
    context += -context % _CONTEXT_STEP
    cache, state = context_memory(plan.checkpoint.config, context)
    projector = sum(file.nbytes for file in plan.files[len(MEASURED) :])
    beside = cache + state + projector
    rows = sorted(_rows(plan, beside), key=lambda row: -row.file_bytes)
    fitting = tuple(row for row in rows if row.total_bytes <= memory)
    name = plan.checkpoint.name
    if not fitting:
        least = rows[-1]
        expected = f"at least {size_rounded_up(least.total_bytes)} ({least.total_bytes:,} bytes)"
        raise UsageError(
            f"--fit {size(memory)}",
            f"too little for {name} with a context of {context:,} tokens",
            expected=f"{expected}, for {least.type}",
        )
    measured = projector if len(plan.files) > len(MEASURED) else None
    return MemoryFit(name, memory, context, cache, state, measured, fitting, tuple(plan.notes))


def _rows(plan: Plan, beside: int) -> Iterator[FittingType]:
    floats, quantized = files_of(plan)[: len(MEASURED)]
    for file_type in FILE_TYPES.values():
        kinds, lacking = _kinds(plan, file_type)
        file = (quantized if file_type.quantized else floats).size_with(kinds)
        yield FittingType(file_type.name, file, file + beside, lacking)


def _kinds(plan: Plan, file_type: FileType) -> tuple[Kinds, bool]:
    """Return the types of a file's tensors, and whether it lacks an importance matrix."""
    given = plan.options.inputs.imatrix is not None
    try:
        return chooser_of(plan, imatrix=given).kinds(file_type)[0], False
    except UsageError:  # without a matrix: as it would be with one, unless it is refused again
        return chooser_of(plan, imatrix=True).kinds(file_type, checked=False)[0], True


def fit_text(fit: MemoryFit) -> str:
    """Render it for people."""
    beside = [
        ("KV cache, f16", fit.kv_cache),
        ("state of linear attention, f32", fit.state),
        *((("mmproj, F16", fit.projector),) if fit.projector is not None else ()),
    ]
    rows = [
        [row.type, f"{row.file_bytes:,}", f"{row.total_bytes:,}", _remark(row, number)]
        for number, row in enumerate(fit.types)
    ]
    return "\n".join(
        [
            f"{fit.model} in {size(fit.memory)} with a context of {fit.context:,} tokens",
            *(f"  {name:<32} {nbytes:>17,}" for name, nbytes in beside),
            f"  not counted: {NOT_COUNTED}",
            "",
            *table_lines(["type", "file", "with all above", ""], rows),
        ]
    )


def _remark(row: FittingType, number: int) -> str:
    remarks = ["largest that fits"] if number == 0 else []
    remarks += ["needs --imatrix"] if row.needs_imatrix else []
    return ", ".join(remarks)
