"""What config.json means for the numbers, and whether it means the same as that of the source."""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

from qwen35.errors import ConfigError, Finding
from qwen35.model.config_keys import SECTIONS, ConfigKey
from qwen35.model.model_config import ModelConfig
from qwen35.model.rope import SCALED, rope_of
from qwen35.tensors import DTYPE_NAMES
from qwen35.verification.settings_comparison import SettingsComparison, same_value, shown

__all__ = ["compare_configs", "text_meaning", "token_ids", "token_meaning"]

_CONFIG = "config.json"
_ROPE = "rope_parameters."
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_BESIDE = ("original_max_position_embeddings", "partial_rotary_factor", "rope_theta")

_TEXT: dict[str, Any] = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
"""Keys of the text model with the value of one that is absent.

Sources: transformers 5.23 ``Qwen3_5TextConfig``; vLLM 0.32 for ``mamba_ssm_dtype``, which
transformers ignores.
"""

_MOE: dict[str, Any] = {
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
}
"""What a mixture of experts has besides (``Qwen3_5MoeTextConfig``)."""

_VISION: dict[str, Any] = {
    "deepstack_visual_indexes": [],
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 3584,
    "patch_size": 16,
    "spatial_merge_size": 2,
}
"""The same for the vision tower (``Qwen3_5VisionConfig``)."""

_ROOT: dict[str, Any] = {
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
"""The same for the root of a vision-language config (``Qwen3_5Config``)."""

_HARMLESS = {
    key
    for key, row in SECTIONS["vision_config"].items()  # what any section may have
    if not row.gguf and not row.only
}
"""Keys that no number depends on."""

_ELSEWHERE = {
    *("dtype", "full_attention_interval", "layer_types", "model_type", "mtp_num_hidden_layers"),
    *("original_max_position_embeddings", "partial_rotary_factor", "quantization_config"),
    *("rope_parameters", "rope_scaling", "rope_theta", "text_config", "tie_word_embeddings"),
    *("torch_dtype", "vision_config", *_TOKENS),
}
"""Keys that say one thing in several ways, or that are compared by themselves."""


def text_meaning(config: ModelConfig) -> dict[str, Any]:
    """Return what decides the numbers of the text model, with the defaults filled in."""
    defaults = _TEXT | _MOE if config.moe else _TEXT
    skip = _ROOT if config.moe else _ROOT | dict.fromkeys(_MOE.keys() - _TEXT.keys())
    return {
        **_section(config.text_raw, SECTIONS["text_config"], defaults, skip=skip),
        **_rope(config.text_raw),
        "layer_types": list(config.layer_types),
        "tie_word_embeddings": config.tied,
        "dtype": config.dtype,
    }


def _section(
    section: Mapping[str, Any],
    table: Mapping[str, ConfigKey],
    defaults: Mapping[str, Any],
    *,
    skip: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Return the keys of a section that matter; of one with a single value, that value."""
    given = {
        key: value
        for key, value in section.items()
        if value is not None and key not in _HARMLESS | _ELSEWHERE and key not in skip
    }
    fixed = {key: row.only for key, row in table.items() if row.only}
    meaning = {**defaults, **{key: only[0] for key, only in fixed.items()}, **given}
    for key, only in fixed.items():
        if any(same_value(meaning[key], value) for value in only):
            meaning[key] = only[0]
    return meaning


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding, whichever keys describe it."""
    try:
        rope = rope_of(text)
    except ConfigError:  # transformers would refuse it: then its text alone can be compared
        given = text.get("rope_scaling") or text.get("rope_parameters")
        return {"rope_parameters": given}
    parameters = {
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
        **{key: value for key, value in rope.parameters.items() if key != "type"},
        "rope_type": rope.kind,
    }
    if "factor" in parameters:  # of which null means one by the lengths
        scaled = "factor" in SCALED[rope.kind]
        parameters["factor"] = rope.factor if scaled else parameters["factor"]
    meaning = {f"{_ROPE}{key}": value for key, value in parameters.items() if value is not None}
    # Values beside the parameters lose in transformers; other engines may read them first.
    beside = {key: text[key] for key in _BESIDE if text.get(key) is not None}
    return meaning | {
        key: value for key, value in beside.items() if not same_value(value, parameters.get(key))
    }


def token_meaning(config: ModelConfig, *, whole: bool) -> dict[str, Any]:
    """Return the ids of special tokens.

    Args:
        config: the config.
        whole: name those of the root and of the text model apart; else the root's win.
    """
    root = {key: config.raw.get(key) for key in _TOKENS}
    text = {key: config.text_raw.get(key) for key in _TOKENS}
    if whole:
        text = {f"text_config.{key}": value for key, value in text.items()}
        return {key: token_ids(value) for key, value in {**root, **text}.items()}
    return {key: token_ids(text[key] if root[key] is None else root[key]) for key in _TOKENS}


def token_ids(value: Any) -> Any:
    """Return one id for a list of one; the order of several means nothing."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else sorted(value, key=repr)


def _vision_meaning(config: ModelConfig) -> dict[str, Any]:
    tower = _section(config.raw["vision_config"], SECTIONS["vision_config"], _VISION)
    rope = config.raw["vision_config"].get("rope_parameters")
    rope = {"rope_theta": 10000, "rope_type": "axial", **(rope if isinstance(rope, dict) else {})}
    if rope["rope_type"] == "default":  # transformers sets the tower's own kind instead
        rope["rope_type"] = "axial"
    tower["rope_parameters"] = rope
    # Keys of the text model may stand at the root as well, where nothing reads them.
    root = _section(config.raw, SECTIONS[""], _ROOT, skip=SECTIONS["text_config"])
    return {**root, **{f"vision_config.{key}": value for key, value in tower.items()}}


def compare_configs(
    config: ModelConfig,
    source: ModelConfig,
    *,
    mtp: bool,
    result: SettingsComparison,
    excused: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Compare what two configs mean; the tower only if both have one.

    Args:
        config: of the artifact.
        source: of the source.
        mtp: whether the artifact has the layer of multi-token prediction.
        result: receives findings and notes.
        excused: keys that may differ, with what to note then.
    """
    whole = config.architecture.vision and source.architecture.vision
    sides = []
    for one in (config, source):
        meaning = text_meaning(one) | token_meaning(one, whole=whole)
        if whole:
            meaning |= _vision_meaning(one)
        if mtp:
            meaning["mtp_num_hidden_layers"] = one.mtp_layers
        sides.append(meaning)
    if source.mtp_layers and not mtp:
        result.notes.append("the source's layer of multi-token prediction is not in it")
    here, there = sides
    for key, note in excused.items():
        if not same_value(here.get(key), there.get(key)):
            result.notes.append(note)
            there[key] = here[key]
    unknown = _unknown(here.keys() ^ there.keys())
    result.differ("config", _CONFIG, here, there, unknown=unknown)
    for key, value in sorted((config.quantization or {}).items()):
        computes = DTYPE_NAMES[source.dtype]
        if key.endswith("compute_dtype") and not same_value(value, computes):
            message = f"{key} is {shown(value)}, the source has weights in {computes}"
            result.findings.append(Finding("config", _CONFIG, message))


def _unknown(lone: Set[str]) -> Set[str]:
    """Return those of the keys that only one side has which no table knows."""
    known = {key for section in SECTIONS.values() for key in section}
    return {
        key for key in lone if key.rpartition(".")[2] not in known and not key.startswith(_ROPE)
    }
