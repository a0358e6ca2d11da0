"""Settings in config.json: what MLX takes where there are none, and what it reads otherwise.

Sources: mlx-lm 0.32 ``models/qwen3_5.py`` (``TextModelArgs``), ``models/qwen3_next.py``,
``models/rope_utils.py``; mlx-vlm 0.7 ``models/qwen3_5``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from math import inf, isclose
from typing import Any

from qwen35.errors import ConfigError
from qwen35.model.config_keys import fixed_values
from qwen35.model.model_config import ARCHITECTURES, ModelConfig
from qwen35.model.rope import DEFAULT_LENGTH, RopeSettings, rope_of, usual_attention
from qwen35.model.text_only import ROOT_KEYS, TEXT_TYPES

__all__ = ["full_attention_interval", "misread", "nested", "set_settings", "with_rope"]

_CONFIG = "config.json"
_INTERVAL = "full_attention_interval"
_ROPE = {"rope_theta": 100000.0, "partial_rotary_factor": 0.25}
"""What MLX takes for parameters that ``rope_parameters`` lacks."""

_SECTIONS = [11, 11, 10]
_KINDS = ("default", "linear", "yarn", "llama3")
"""Kinds of scaling that mlx-lm computes as transformers does."""

_READ = ("vision_config.in_channels", "vision_config.temporal_patch_size")
"""Keys that MLX obeys, though llama.cpp does not."""


def with_rope(text: MutableMapping[str, Any]) -> None:
    """Write out the rotary embedding that MLX takes from a text config of its own.

    ``rope_parameters`` win over keys beside them; where they are empty, these count.
    """
    given = text.get("rope_parameters", {"mrope_section": _SECTIONS})
    if given and not isinstance(given, dict):
        return  # refused where it is parsed
    beside = text.pop("rope_scaling", None)
    if not given:
        given = {key: text[key] for key in _ROPE if text.get(key) is not None}
        given |= beside if isinstance(beside, dict) else {}
    text["rope_parameters"] = parameters = {**given}
    for key, value in _ROPE.items():
        parameters.setdefault(key, value)
    kind = parameters.pop("type", None)
    if kind:
        parameters["rope_type"] = kind


def set_settings(text: dict[str, Any], config: ModelConfig) -> None:
    """Write out in a text config what MLX takes otherwise where it is missing.

    Raises:
        ConfigError: MLX has no such layers.
    """
    text[_INTERVAL] = full_attention_interval(config)
    text["head_dim"] = config.dims["head"]
    text.setdefault("rms_norm_eps", 1e-6)
    text.setdefault("max_position_embeddings", DEFAULT_LENGTH)
    text.setdefault("linear_conv_kernel_dim", config.dims["conv"])
    if config.moe:
        text.setdefault("num_experts_per_tok", 8)
        if "norm_topk_prob" in text:  # only MLX obeys it
            text["norm_topk_prob"] = True
    else:
        text.pop("num_experts", None)  # which would make it a mixture in MLX
    text.pop("rope_scaling", None)
    rope = rope_of(config.text_raw)
    parameters = {key: value for key, value in rope.parameters.items() if key != "type"}
    parameters.setdefault("mrope_section", _SECTIONS)
    own: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if parameters.get("factor", 0) is None:
        own["factor"] = rope.factor
    text["rope_parameters"] = {**parameters, **own, "partial_rotary_factor": rope.partial}


def full_attention_interval(config: ModelConfig) -> int:
    """Return the distance of layers with full attention, from which MLX derives all types.

    Raises:
        ConfigError: there is none.
    """
    full = [kind == "full_attention" for kind in config.layer_types]
    interval = full.index(True) + 1 if True in full else 0
    if not interval or full != [(i + 1) % interval == 0 for i in range(len(full))]:
        found = "layer_types follow no interval" if interval else "no layer has full_attention"
        raise ConfigError(_CONFIG, found, expected="every n-th full_attention, as in MLX")
    return interval


def nested(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a text model in the form of one with a tower, which MLX expects."""
    [model_type] = [whole for whole, text in TEXT_TYPES.items() if text == raw["model_type"]]
    text = {key: value for key, value in raw.items() if key not in ("architectures", *ROOT_KEYS)}
    root = {key: raw[key] for key in ROOT_KEYS if key in raw}
    return {
        "architectures": [ARCHITECTURES[model_type].class_name],
        "model_type": model_type,
        **root,
        "text_config": text,
    }


def misread(raw: Mapping[str, Any], text: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    """Yield the settings with which MLX computes another model than transformers, or none.

    Args:
        raw: config.json.
        text: its section about the text model.
        config: what transformers reads.
    """
    for one in fixed_values(raw):
        if one.path not in _READ and "mtp_" not in one.path:
            yield f"{one.path} is {_shown(one.value)}: MLX computes {one.row.why}"
    yield from _of_layers(text, config)
    if not _number(text.get("rms_norm_eps", 1e-6)):
        yield f"rms_norm_eps is {_shown(text['rms_norm_eps'])}, expected a number"
    yield from _of_experts(text, config)
    try:
        yield from _of_rope(rope_of(text))
    except ConfigError as error:
        yield error.message


def _of_layers(text: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    interval = text.get(_INTERVAL, 4)
    try:
        expected: int | str = full_attention_interval(config)
    except ConfigError as error:
        yield error.message
        return
    if type(interval) is not int or interval != expected:
        shown = _shown(interval) if _INTERVAL in text else "missing, which MLX takes for 4"
        yield f"{_INTERVAL} is {shown}, expected {expected} by layer_types"


def _of_experts(text: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    if not config.moe:
        if text.get("num_experts"):
            yield "num_experts is set: MLX takes a dense model for a mixture of experts"
        return
    used, key = text.get("num_experts_per_tok"), "num_experts_per_tok"
    if type(used) is not int or not 0 < used <= config.dims["experts"]:
        shown = f"is {_shown(used)}" if key in text else "is missing, which MLX takes for 0"
        yield f"{key} {shown}, expected 1 to {config.dims['experts']}"
    if text.get("norm_topk_prob", True) is not True:
        shown = _shown(text["norm_topk_prob"])
        yield f"norm_topk_prob is {shown}: MLX obeys it, transformers always normalizes"


def _of_rope(rope: RopeSettings) -> Iterator[str]:
    given = rope.parameters
    if rope.kind not in _KINDS:
        yield f"rope_type is {rope.kind}, which MLX computes otherwise, expected {_listed(_KINDS)}"
    elif rope.kind != "default" and given["factor"] is None:
        yield "factor of rope_parameters is None, expected a number"
    elif rope.kind == "yarn":
        scales = given.get("mscale", 1), given.get("mscale_all_dim", 0)
        if not all(map(_number, scales)) or not isclose(rope.attention, _attention(rope, *scales)):
            yield "the scale of attention in rope_parameters is one that MLX does not compute"
        if given.get("truncate", True) is not True:
            yield "truncate of rope_parameters is not true: MLX always rounds YaRN's range"


def _attention(rope: RopeSettings, scale: float, all_dim: float) -> float:
    """Return the factor of cosine and sine that MLX takes for YaRN."""
    return usual_attention(rope.factor, scale) / usual_attention(rope.factor, all_dim)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < inf


def _shown(value: object) -> str:
    return ascii(value)[:80]


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
