"""The config.json of an output, derived from what the plan writes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen35.model.config import ARCHITECTURES, ModelConfig
from qwen35.tensors import HUB_DTYPES

if TYPE_CHECKING:
    from qwen35.plan.plan import Step

__all__ = ["output_config", "skip_modules"]

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
    config: ModelConfig, steps: Sequence[Step], *, packs_nf4: bool, text_only: bool, prefix: str
) -> dict[str, Any]:
    """Return config.json for the tensors that `steps` write.

    Args:
        config: of the source.
        steps: all of them.
        packs_nf4: whether the output is an NF4 checkpoint of our making.
        text_only: whether the vision tower of a vision-language source is dropped.
        prefix: what text tensors begin with in the output.
    """
    raw = _text_only(config) if text_only else copy.deepcopy(config.raw)
    text = raw.get("text_config", raw)
    if "mtp_num_hidden_layers" in text and not _writes_mtp(steps):
        text["mtp_num_hidden_layers"] = 0
    for holder in (raw, text):
        holder.pop("quantization_config", None)
    if packs_nf4:
        raw["quantization_config"] = _nf4_config(config, skip_modules(steps, prefix))
    elif config.quantization is not None and _writes_packed(steps):
        raw["quantization_config"] = _carried(config.quantization, text_only, prefix)
    return raw


def _writes_mtp(steps: Sequence[Step]) -> bool:
    return any(step.outputs and step.role.scope == "mtp" for step in steps)


def _writes_packed(steps: Sequence[Step]) -> bool:
    return any(out.dtype in ("U8", "F8_E4M3") for step in steps for out in step.outputs)


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


def _nf4_config(config: ModelConfig, skip: list[str]) -> dict[str, Any]:
    compute = {short: name for name, short in HUB_DTYPES.items()}[config.dtype]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": skip,
    }


def _carried(quantization: dict[str, Any], text_only: bool, prefix: str) -> dict[str, Any]:
    """Return the source's own quantization_config with its module lists following the output."""
    result = copy.deepcopy(quantization)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        names = result.get(key)
        if not isinstance(names, list) or not text_only:
            continue
        kept = [name for name in names if not _is_vision(str(name))]
        result[key] = [str(name).replace("model.language_model.", prefix, 1) for name in kept]
    return result


def _is_vision(module: str) -> bool:
    return module in ("visual", "model.visual") or module.startswith("model.visual.")


def skip_modules(steps: Sequence[Step], prefix: str) -> list[str]:
    """Return ``llm_int8_skip_modules``: every linear module that stays unpacked.

    transformers skips a module if an entry is its name, the beginning of its name up to a dot, or
    the end of it (5.23 ``quantizers_utils.should_convert_module``). Giving any list switches off
    its own exception for the head, so ``lm_head`` is always in it.
    """
    skip = ["lm_head"]
    packed = [_module(step) for step in steps if step.op == "nf4" or _is_packed(step)]
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


def _is_packed(step: Step) -> bool:
    return bool(step.outputs) and step.outputs[0].dtype == "U8"


def _is_plain_linear(step: Step) -> bool:
    return bool(step.outputs) and step.role.info.kind == "linear" and not _is_packed(step)


def _entries(role: str, modules: list[str], packed: list[str]) -> list[str]:
    """Name `modules` by the shortest end of their role that no packed module shares."""
    segments = role.split(".")
    for length in range(1, len(segments) + 1):
        ending = ".".join(segments[-length:])
        if not any(module.endswith(ending) for module in packed):
            return [ending]
    return modules
