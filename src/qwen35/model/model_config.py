"""Validated config.json of a Qwen3.5 checkpoint, reduced to the numbers this package needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen35.errors import ConfigError
from qwen35.tensors import HUB_DTYPES

__all__ = ["ARCHITECTURES", "ModelConfig", "parse_config"]


@dataclass(frozen=True)
class Architecture:
    """One member of the family, identified by `model_type`."""

    class_name: str
    moe: bool
    vision: bool


ARCHITECTURES: dict[str, Architecture] = {
    "qwen3_5": Architecture("Qwen3_5ForConditionalGeneration", moe=False, vision=True),
    "qwen3_5_moe": Architecture("Qwen3_5MoeForConditionalGeneration", moe=True, vision=True),
    "qwen3_5_text": Architecture("Qwen3_5ForCausalLM", moe=False, vision=False),
    "qwen3_5_moe_text": Architecture("Qwen3_5MoeForCausalLM", moe=True, vision=False),
}
"""Architectures by `model_type` in config.json (transformers 5.23, `models/qwen3_5*`)."""

_OTHERS = dict.fromkeys(
    ("qwen4_exp", "qwen4_exp_text"),
    "that is Qwen3.8-Flash-Next, whose layers differ (indexed attention, hyper-connections, "
    "n-gram embeddings) and which this tool does not convert",
)
"""What releases of other architectures are, whose names suggest this family."""

_TEXT_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "vocab_size",
)
_MOE_SIZES = ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")
_VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
    "out_hidden_size",
)
_DEFAULTS = {"linear_conv_kernel_dim": 4, "head_dim": 256}
_LIMITS = {
    "num_hidden_layers": 10_000,
    "depth": 10_000,
    "num_experts": 100_000,
    "mtp_num_hidden_layers": 100,
}
"""Upper bounds of counts that planning loops over: larger values are damaged or hostile."""


@dataclass(frozen=True)
class ModelConfig:
    """The geometry of a checkpoint.

    Args:
        raw: parsed config.json, never modified.
        model_type: a key of `ARCHITECTURES`.
        dims: every symbolic size used in the shapes of `qwen35.model.roles`.
        layer_types: ``linear_attention`` or ``full_attention``, per decoder layer.
        vision_depth: number of vision blocks, 0 without a vision tower.
        mtp_layers: value of ``mtp_num_hidden_layers``; the layers that are stored, once a
            checkpoint is reconciled (`qwen35.checkpoint.reconciled`).
        tied: whether ``lm_head`` shares the embedding matrix.
        dtype: the checkpoint's dtype, by its safetensors name.
    """

    raw: dict[str, Any]
    model_type: str
    dims: dict[str, int]
    layer_types: tuple[str, ...]
    vision_depth: int
    mtp_layers: int
    tied: bool
    dtype: str

    @property
    def architecture(self) -> Architecture:
        """The architecture named by `model_type`."""
        return ARCHITECTURES[self.model_type]

    @property
    def moe(self) -> bool:
        """True if the feed-forward layers are mixtures of experts."""
        return self.architecture.moe

    @property
    def text_raw(self) -> dict[str, Any]:
        """The section of `raw` that describes the text model."""
        text: dict[str, Any] = self.raw["text_config"] if self.architecture.vision else self.raw
        return text

    @property
    def experts_per_token(self) -> int:
        """How many experts each token reaches, 8 unless config.json says otherwise; 0 if dense.

        Raises:
            ConfigError: it is no number of experts.
        """
        if not self.moe:
            return 0
        key, most = "num_experts_per_tok", self.dims["experts"]
        count = self.text_raw.get(key, min(8, most))
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= most:
            raise ConfigError("config.json", f"{key} {repr(count)[:80]}", expected=f"1 to {most}")
        return count

    @property
    def geometry(self) -> dict[str, int]:
        """The sizes of the text model, identical with and without a vision tower."""
        sizes = {name: n for name, n in self.dims.items() if not name.startswith("vision")}
        return {"layers": len(self.layer_types), **sizes}

    @property
    def promised_mtp(self) -> int:
        """The value of ``mtp_num_hidden_layers`` in config.json, which may promise too much."""
        return _promised_mtp(self.raw, self.text_raw)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's ``quantization_config``, or None."""
        for section in (self.raw, self.text_raw):
            value = section.get("quantization_config")
            if isinstance(value, dict):
                return value
        return None


def _sizes(section: dict[str, Any], names: tuple[str, ...], where: str) -> dict[str, int]:
    result = {}
    for name in names:
        value = section.get(name, _DEFAULTS.get(name))
        limit = _LIMITS.get(name, 2**31 - 1)
        # type(), not isinstance(): JSON true is a Python int.
        if type(value) is not int or not 0 < value <= limit:
            raise ConfigError(
                "config.json",
                f"{where}{name} is {repr(value)[:80]}",
                expected=f"a positive integer, {limit} at most",
            )
        result[name] = value
    return result


def _model_type(raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(
            "config.json",
            f"model_type {model_type!r} is not a Qwen3.5 architecture",
            expected=" or ".join(ARCHITECTURES),
            hint=_OTHERS.get(str(model_type)) or _type_hint(raw.get("architectures")),
        )
    return model_type


def _type_hint(architectures: object) -> str:
    """Return the model_type that the class in ``architectures`` has, if it is one of ours."""
    for name, architecture in ARCHITECTURES.items():
        if architectures == [architecture.class_name]:
            return f"architectures says {architecture.class_name}, whose model_type is {name}"
    return "this tool converts Qwen3.5 checkpoints and later releases of the same classes"


def _layer_types(text: dict[str, Any], layers: int) -> tuple[str, ...]:
    layer_types = text.get("layer_types")
    if layer_types is None:
        interval = text.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            raise ConfigError("config.json", f"full_attention_interval is {interval!r}")
        return tuple(
            "full_attention" if (i + 1) % interval == 0 else "linear_attention"
            for i in range(layers)
        )
    valid = {"linear_attention", "full_attention"}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != layers
        or not set(map(str, layer_types)) <= valid
    ):
        raise ConfigError(
            "config.json",
            "layer_types does not fit num_hidden_layers",
            expected=f"{layers} times linear_attention or full_attention",
        )
    return tuple(layer_types)


def _vision(section: dict[str, Any]) -> dict[str, int]:
    v = _sizes(section, _VISION_SIZES, "vision_config.")
    # The merger concatenates a square of neighbouring patches.
    merged = v["hidden_size"] * v["spatial_merge_size"] ** 2
    return {
        "vision_depth": v["depth"],
        "vision_hidden": v["hidden_size"],
        "vision_qkv": 3 * v["hidden_size"],
        "vision_ffn": v["intermediate_size"],
        "vision_channels": v["in_channels"],
        "vision_frames": v["temporal_patch_size"],
        "vision_patch": v["patch_size"],
        "vision_positions": v["num_position_embeddings"],
        "vision_merged": merged,
        "vision_out": v["out_hidden_size"],
    }


def _text(text: dict[str, Any], moe: bool) -> dict[str, int]:
    t = _sizes(text, _TEXT_SIZES, "")
    key_dim = t["linear_num_key_heads"] * t["linear_key_head_dim"]
    value_dim = t["linear_num_value_heads"] * t["linear_value_head_dim"]
    # q_proj computes queries and, interleaved per head, the output gate.
    gated = 2 if text.get("attn_output_gate", True) else 1
    dims = {
        "one": 1,
        "vocab": t["vocab_size"],
        "hidden": t["hidden_size"],
        "two_hidden": 2 * t["hidden_size"],
        "head": t["head_dim"],
        "query": gated * t["num_attention_heads"] * t["head_dim"],
        "key_value": t["num_key_value_heads"] * t["head_dim"],
        "attention": t["num_attention_heads"] * t["head_dim"],
        "linear_qkv": 2 * key_dim + value_dim,
        "linear_value": value_dim,
        "linear_heads": t["linear_num_value_heads"],
        "linear_head": t["linear_value_head_dim"],
        "conv": t["linear_conv_kernel_dim"],
    }
    if moe:
        m = _sizes(text, _MOE_SIZES, "")
        dims |= {
            "experts": m["num_experts"],
            "expert_ffn": m["moe_intermediate_size"],
            "expert_gate_up": 2 * m["moe_intermediate_size"],
            "shared_ffn": m["shared_expert_intermediate_size"],
        }
    else:
        dims["ffn"] = _sizes(text, ("intermediate_size",), "")["intermediate_size"]
    return dims


def _tied(raw: dict[str, Any], text: dict[str, Any]) -> bool:
    """Return what transformers' loader goes by: the root, even of a vision-language config."""
    tied: object = False
    for section in (text, raw):
        tied = section.get("tie_word_embeddings", False)
        if type(tied) is not bool:
            found = f"tie_word_embeddings is {repr(tied)[:80]}"
            raise ConfigError("config.json", found, expected="true or false")
    return bool(tied)


def _dtype(raw: dict[str, Any], text: dict[str, Any]) -> str:
    for section in (raw, text):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                name = HUB_DTYPES.get(str(section[key]))
                if name is None:
                    raise ConfigError(
                        "config.json", f"{key} is {section[key]!r}", expected=", ".join(HUB_DTYPES)
                    )
                return name
    return "BF16"


def _promised_mtp(raw: dict[str, Any], text: dict[str, Any]) -> int:
    mtp = text.get("mtp_num_hidden_layers", raw.get("mtp_num_hidden_layers", 0)) or 0
    if type(mtp) is not int or not 0 <= mtp <= _LIMITS["mtp_num_hidden_layers"]:
        raise ConfigError("config.json", f"mtp_num_hidden_layers is {mtp!r}")
    return mtp


def parse_config(raw: object) -> ModelConfig:
    """Validate a parsed config.json.

    Raises:
        ConfigError: the architecture is unknown, or a size is missing or invalid.
    """
    if not isinstance(raw, dict):
        raise ConfigError("config.json", "not a JSON object")
    model_type = _model_type(raw)
    arch = ARCHITECTURES[model_type]
    text = raw.get("text_config") if arch.vision else raw
    if not isinstance(text, dict):
        raise ConfigError("config.json", "text_config is missing")
    dims = _text(text, arch.moe)
    vision_depth = 0
    if arch.vision:
        section = raw.get("vision_config")
        if not isinstance(section, dict):
            raise ConfigError("config.json", "vision_config is missing")
        vision = _vision(section)
        vision_depth = vision.pop("vision_depth")
        dims |= vision
    layers = int(text["num_hidden_layers"])
    return ModelConfig(
        raw=raw,
        model_type=model_type,
        dims=dims,
        layer_types=_layer_types(text, layers),
        vision_depth=vision_depth,
        mtp_layers=_promised_mtp(raw, text),
        tied=_tied(raw, text),
        dtype=_dtype(raw, text),
    )
