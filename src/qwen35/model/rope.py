"""The rotary embedding that a text config describes, as transformers takes it.

Source: transformers 5.23 ``modeling_rope_utils.py``; ``models/qwen3_5/configuration_qwen3_5.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.errors import ConfigError

__all__ = ["SCALED", "RopeSettings", "rope_of", "usual_attention"]

DEFAULT_LENGTH = 32768
"""``max_position_embeddings`` of a config that has none."""

SCALED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""The scaling types of transformers, with their required parameters."""

_FROM_LENGTH = ("llama3", "yarn", "longrope")
_LAYERS = ("full_attention", "linear_attention")


@dataclass(frozen=True)
class RopeSettings:
    """A rotary embedding.

    Args:
        kind: of scaling, a key of `SCALED`.
        theta: base of the frequencies.
        partial: share of a head that is rotated.
        factor: by which positions are stretched; 1.0 without scaling.
        length: positions of pre-training, from which some kinds of scaling start.
        attention: factor of cosine and sine.
        parameters: all parameters by name, defaults of `theta` and `partial` included.
    """

    kind: str
    theta: float
    partial: float
    factor: float
    length: int
    attention: float
    parameters: Mapping[str, Any]

    def number(self, key: str, default: float) -> float:
        """Return a parameter for which null and zero mean the default, as in transformers.

        Raises:
            ConfigError: it is not a number.
        """
        return _number(self.parameters, key) if self.parameters.get(key) else default


def rope_of(text: Mapping[str, Any]) -> RopeSettings:
    """Return the rotary embedding of a text config.

    ``rope_scaling`` replaces ``rope_parameters`` as a whole; keys beside them are only defaults.

    Raises:
        ConfigError: transformers would refuse it.
    """
    given = _section(text, "rope_scaling") or _section(text, "rope_parameters")
    nested = [key for key in given if key in _LAYERS]
    if nested:
        raise ConfigError(
            "config.json",
            f"separate rope_parameters for {nested[0]} layers",
            expected="one set of parameters: Qwen3.5 has one rotary embedding",
        )
    parameters = {"rope_theta": text.get("rope_theta", 10000.0), **given}
    partial = text.get("partial_rotary_factor", 0.25)
    if partial is not None:
        parameters.setdefault("partial_rotary_factor", partial)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALED:
        raise ConfigError(
            "config.json", f"rope_type is {repr(kind)[:80]}", expected=", ".join(SCALED)
        )
    missing = [key for key in SCALED[kind] if key not in parameters]
    if missing:
        raise ConfigError("config.json", f"rope_type {kind} without {missing[0]}")
    length = _length(text, parameters, kind)
    factor = _factor(text, parameters, kind, length)
    return RopeSettings(
        kind,
        theta=_number(parameters, "rope_theta"),
        partial=_number({"partial_rotary_factor": 1.0} | parameters, "partial_rotary_factor"),
        factor=factor,
        length=length,
        attention=_yarn_attention(parameters, factor) if kind == "yarn" else 1.0,
        parameters=parameters,
    )


def usual_attention(factor: float, scale: float = 1.0) -> float:
    """Return the factor of cosine and sine that YaRN derives from the factor of positions."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _section(text: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = text.get(key)
    if section is not None and not isinstance(section, dict):
        found = f"{key} is {repr(section)[:80]}"
        raise ConfigError("config.json", found, expected="a JSON object")
    return section or {}


def _number(section: Mapping[str, Any], key: str) -> float:
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**32:
        raise ConfigError("config.json", f"{key} is {repr(value)[:80]}", expected="a number")
    return value


def _length(text: Mapping[str, Any], parameters: dict[str, Any], kind: str) -> int:
    """Return the positions of pre-training; a key beside the parameters wins."""
    key, limit = "original_max_position_embeddings", "max_position_embeddings"
    longest = {limit: DEFAULT_LENGTH, **text}
    if kind not in _FROM_LENGTH:
        return int(_number(longest, limit))
    if key in text:
        parameters[key] = text[key]
    parameters.setdefault(key, longest[limit])
    length = _number(parameters, key)
    if length < 1:
        raise ConfigError("config.json", f"{key} is {length}", expected="a positive number")
    return int(length)


def _factor(
    text: Mapping[str, Any], parameters: Mapping[str, Any], kind: str, length: int
) -> float:
    if "factor" not in SCALED[kind]:
        return 1.0
    if kind == "yarn" and parameters["factor"] is None:
        return (
            _number({"max_position_embeddings": DEFAULT_LENGTH, **text}, "max_position_embeddings")
            / length
        )
    factor = _number(parameters, "factor")
    if factor == 0:
        raise ConfigError(
            "config.json", "factor is 0", expected="1 or more, the stretch of positions"
        )
    return factor


def _yarn_attention(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    scales = [parameters.get(key) for key in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return usual_attention(factor)
    scale, all_dim = (_number(parameters, key) for key in ("mscale", "mscale_all_dim"))
    return usual_attention(factor, scale) / usual_attention(factor, all_dim)
