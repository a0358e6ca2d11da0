"""The config.json of an output, derived from what the plan writes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.storage import FP8_BLOCK
from qwen35.errors import UsageError
from qwen35.model.config import ARCHITECTURES, ModelConfig
from qwen35.tensors import DTYPE_NAMES

if TYPE_CHECKING:
    from qwen35.plan.step import Step

__all__ = ["output_config", "skip_modules", "unconverted_modules"]

_TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_ROOT_ONLY = (
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Keys that a text-only config takes from the root of the vision-language one, if set there."""


def output_config(
    config: ModelConfig, steps: Sequence[Step], *, text_only: bool, prefix: str
) -> dict[str, Any]:
    """Return config.json for the tensors that `steps` write.

    Args:
        config: of the source.
        steps: all of them.
        text_only: whether the vision tower of a vision-language source is dropped.
        prefix: what text tensors begin with in the output.

    Raises:
        UsageError: the steps write what no loader could read.
    """
    raw = _text_only(config) if text_only else copy.deepcopy(config.raw)
    text = raw["text_config"] if ARCHITECTURES[raw["model_type"]].vision else raw
    for holder in (raw, text):
        holder.pop("quantization_config", None)
    if config.mtp_layers:
        _set_mtp(raw, text, config.mtp_layers if _writes_mtp(steps) else 0)
    packings = {step.packing for step in steps} - {None}
    if len(packings) > 1:
        found = "would leave NF4 and FP8 weights in one checkpoint"
        raise UsageError("recipe", found, hint="decode the source first, with --recipe bf16")
    if "nf4" in packings:
        raw["quantization_config"] = _nf4_config(config, steps, prefix)
    elif "fp8" in packings:
        raw["quantization_config"] = _fp8_config(steps)
    return raw


def _set_mtp(raw: dict[str, Any], text: dict[str, Any], layers: int) -> None:
    """Write how many MTP layers there are, wherever the source says it."""
    key = "mtp_num_hidden_layers"
    text[key] = layers
    if key in raw:
        raw[key] = layers


def _writes_mtp(steps: Sequence[Step]) -> bool:
    written = {bool(step.outputs) for step in steps if step.role.scope == "mtp"}
    if len(written) > 1:
        raise UsageError("recipe", "drops a part of the MTP layer", hint="drop mtp, or keep it")
    return written == {True}


def _text_only(config: ModelConfig) -> dict[str, Any]:
    root = copy.deepcopy(config.text_raw)
    model_type = _TEXT_TYPES[config.model_type]
    for key in _ROOT_ONLY:
        if config.raw.get(key) is not None:
            root[key] = config.raw[key]
    root.pop("architectures", None)
    return {
        "architectures": [ARCHITECTURES[model_type].class_name],
        **root,
        "model_type": model_type,
    }


def _nf4_config(config: ModelConfig, steps: Sequence[Step], prefix: str) -> dict[str, Any]:
    nested = {
        any(out.name.endswith(".nested_absmax") for out in step.outputs)
        for step in steps
        if step.packing == "nf4"
    }
    if len(nested) > 1:
        raise UsageError(
            "recipe",
            "would mix weights with and without double quantization",
            hint="start from the unquantized checkpoint",
        )
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": DTYPE_NAMES[config.dtype],
        "bnb_4bit_use_double_quant": nested == {True},
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": skip_modules(steps, prefix),
    }


def _fp8_config(steps: Sequence[Step]) -> dict[str, Any]:
    """Return what the official FP8 checkpoints have, and ``fmt``, which some readers ask for."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": unconverted_modules(steps),
    }


def unconverted_modules(steps: Sequence[Step]) -> list[str]:
    """Return ``modules_to_not_convert``: every module with a matrix that is not FP8, by full name.

    The head is always listed: giving any list switches off transformers' own exception for it, and
    a tied head has no tensor. Experts that stay are listed as the one module that engines make.
    """
    modules = {"lm_head"}
    for step in steps:
        if step.outputs and step.packing is None and len(step.spec.shape) > 1:
            name = _module(step)
            experts, found, _ = name.partition(".mlp.experts.")
            modules.add(f"{experts}.mlp.experts" if found else name)
    return sorted(modules)


def skip_modules(steps: Sequence[Step], prefix: str) -> list[str]:
    """Return ``llm_int8_skip_modules``: every linear module that stays unpacked.

    transformers skips a module if an entry is its name, the beginning of its name up to a dot, or
    the end of it (5.23 ``quantizers_utils.should_convert_module``). Giving any list switches off
    its own exception for the head, so ``lm_head`` is always in it.
    """
    skip = ["lm_head"]
    packed = [_module(step) for step in steps if step.packing == "nf4"]
    plain = [step for step in steps if _is_plain_linear(step)]
    if not any(module.startswith("model.visual.") for module in packed):
        if any(step.outputs and step.role.scope == "visual" for step in steps):
            skip.append("model.visual")
        plain = [step for step in plain if step.role.scope != "visual"]
    skip.append(f"{prefix}embed_tokens")
    if _writes_mtp(steps):
        skip.append("mtp")
    for role in sorted({step.role.name for step in plain if step.role.scope != "mtp"}):
        modules = [_module(step) for step in plain if step.role.name == role]
        skip += _entries(role, modules, packed)
    return skip


def _module(step: Step) -> str:
    return step.outputs[0].name.removesuffix(".weight")


def _is_plain_linear(step: Step) -> bool:
    return bool(step.outputs) and step.role.info.kind == "linear" and step.packing is None


def _entries(role: str, modules: list[str], packed: list[str]) -> list[str]:
    """Name `modules` by the shortest end of their role that no packed module shares."""
    segments = role.split(".")
    for length in range(1, len(segments) + 1):
        ending = ".".join(segments[-length:])
        if not any(module.endswith(ending) for module in packed):
            return [ending]
    return modules
