"""The dialect of MLX: what mlx-lm and mlx-vlm load."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.dialect import Dialect, FamilyTensors, Program, StackedTensor
from qwen35.codecs.mlx.codec import MlxNorm, MlxPatches
from qwen35.codecs.mlx.layout import format_of
from qwen35.codecs.mlx.mlx_names import (
    EMBEDDING,
    family_name,
    is_stack,
    split_experts,
    stacked_tensors,
    with_taps,
)
from qwen35.codecs.plain.codec import Plain
from qwen35.errors import ConfigError, TensorError, UsageError
from qwen35.model.model_config import ARCHITECTURES, ModelConfig
from qwen35.model.roles import Role, role_of
from qwen35.model.rope import rope_of
from qwen35.model.text_only import ROOT_KEYS, TEXT_TYPES, text_only_config
from qwen35.tensors import StoredTensor, TensorSpec

__all__ = ["MlxFiles"]

_NORMS = frozenset(
    {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "self_attn.q_norm",
        "self_attn.k_norm",
    }
)
"""Norms that are stored as 1 + w."""

_PATCHES = "visual.patch_embed.proj"
_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
"""Modes by bits and group, where scales are bytes."""


class MlxFiles(Dialect):
    """MLX's safetensors files and config.json."""

    name = "mlx"
    programs = (
        Program(
            "mlx-lm",
            "pip install mlx-lm",
            (
                'mlx_lm.generate --model {repo} --prompt "Hello" --max-tokens 200',
                "mlx_lm.server --model {repo}",
            ),
        ),
        Program(
            "mlx-vlm",
            "pip install mlx-vlm",
            ('mlx_vlm.generate --model {repo} --image IMAGE --prompt "What is this?"',),
            vision=True,
        ),
    )

    # --- reading

    def reads(self, tensors: Mapping[str, StoredTensor]) -> bool:
        """Return whether the embedding has its name in MLX, and something else its form."""
        if EMBEDDING not in tensors:
            return False
        if any(name.endswith(".scales") for name in tensors):
            return True
        taps = (stored.spec for stored in tensors.values() if with_taps(stored.spec) is not None)
        return all(spec.shape[-1] == 1 for spec in taps)

    def family_config(self, raw: object) -> object:
        """Return config.json without MLX's section; flat where there is no tower."""
        if not isinstance(raw, dict):
            return raw
        own = copy.deepcopy(raw)
        sections = {key: own.pop(key, None) for key in ("quantization", "quantization_config")}
        text = own.get("text_config")
        if not isinstance(text, dict) or own.get("model_type") not in [*TEXT_TYPES]:
            return raw
        tied = text.get("tie_word_embeddings", own.get("tie_word_embeddings"))
        if tied is not None:
            own["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
        rope = text.get("rope_parameters")
        if isinstance(rope, dict) and "type" in rope:  # mlx-lm renames it
            rope.setdefault("rope_type", rope.pop("type"))
        if not own.get("vision_config"):
            own = text_only_config(own, text, own["model_type"], tied=tied is True)
            own |= {} if tied is None else {"tie_word_embeddings": tied}  # of whatever type
        own["quantization_config"] = {"quant_method": self.name, **sections}
        return own

    def family_tensors(
        self, tensors: Mapping[str, StoredTensor], config: ModelConfig
    ) -> FamilyTensors:
        """Return the tensors under the family's names, experts one by one."""
        named: dict[str, StoredTensor] = {}
        problems: list[TensorError] = []
        speculation = 0
        for name, stored in tensors.items():
            if "mtp." in name:
                speculation += 1
                continue
            family = family_name(name, vision=config.architecture.vision)
            spec = TensorSpec(family, stored.spec.dtype, stored.spec.shape)
            taps = with_taps(spec)
            if taps is not None and spec.shape[-1] != 1:
                problems.append(_untouched(name, spec, taps))
                taps = None
            whole = replace(stored, spec=taps or spec)
            experts = config.dims.get("experts", 0)
            parts = split_experts(whole, experts)
            if not parts and is_stack(family):
                found, expected = f"a stack of shape {list(spec.shape)}", f"{experts} experts"
                problems.append(TensorError(name, found, expected=f"{expected} by config.json"))
                continue
            for part in parts or [whole]:
                if part.spec.name in named:
                    found = f"two tensors for {part.spec.name}"
                    problems.append(TensorError(name, found))
                named[part.spec.name] = part
        notes = [_dropped(speculation)] if speculation else []
        return FamilyTensors(named, dict(_held(named, config)), problems, notes)

    # --- writing

    def unpacked(self, role: Role) -> str:
        """Return the codec of norms, of the patch embedding, and of all others."""
        if role.name in _NORMS:
            return MlxNorm.name
        return MlxPatches.name if role.name == _PATCHES else Plain.name

    def stacks(self, specs: Iterable[TensorSpec]) -> list[StackedTensor]:
        """Return the tensors of a file that holds these."""
        return stacked_tensors(specs)

    def check(self, config: ModelConfig, modules: Sequence[LoaderModule]) -> None:
        """Check that MLX has all layers, and that MTP is dropped, which it does not load."""
        kept = next((module for module in modules if module.role.scope == "mtp"), None)
        if kept is not None:
            found = f"keeps {kept.spec.name}, which MLX does not load"
            hint = 'put a rule with match = "mtp" and action = "drop" before it'
            raise UsageError("recipe", found, hint=hint)
        if config.dims["query"] != 2 * config.dims["attention"]:
            found, expected = "attn_output_gate is false", "attention with a gate, as in MLX"
            raise ConfigError("config.json", found, expected=expected)
        _interval(config)

    def config(self, raw: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
        """Return config.json with MLX's sections, nested also for a text model alone."""
        section = raw.pop("quantization_config", None)
        if not ARCHITECTURES[raw["model_type"]].vision:
            raw = _nested(raw)
        text = raw["text_config"]
        text["tie_word_embeddings"] = raw["tie_word_embeddings"] = config.tied
        text["full_attention_interval"] = _interval(config)
        text["head_dim"] = config.dims["head"]
        text.pop("rope_scaling", None)
        text["rope_parameters"] = _rope(config)
        if section is not None:
            raw["quantization"] = raw["quantization_config"] = section
        return raw


def _untouched(name: str, spec: TensorSpec, taps: TensorSpec) -> TensorError:
    hint = "with one such convolution MLX adds 1 to all norms again: convert from the original"
    return TensorError(name, f"shape {list(spec.shape)}", expected=f"{list(taps.shape)}", hint=hint)


def _dropped(count: int) -> str:
    return (
        f"{count} tensors of multi-token prediction are left out, as by MLX's loaders: tools "
        "differ in what they store there"
    )


def _held(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the weights that other codecs hold than their dtypes tell, with their codecs."""
    kinds: dict[object, str] = {}
    for name, stored in tensors.items():
        if not name.endswith(".weight"):
            continue
        try:
            role = role_of(name)
        except TensorError:  # named when weights are matched with config.json
            continue
        scales = tensors.get(f"{name.removesuffix('weight')}scales")
        if scales is not None:
            columns = config.dims.get(role.info.shape[-1], 0)
            key = (columns, stored.spec.shape, scales.spec.shape, scales.spec.dtype)
            kind = kinds.setdefault(key, _format(columns, stored.spec, scales.spec))
        else:
            kind = _form(role, stored.spec, config)
        if kind:
            yield name, kind


def _format(columns: int, codes: TensorSpec, scales: TensorSpec) -> str:
    """Return the codec of codes and scales of `columns` values; empty if there is none."""
    words, groups = (spec.shape[-1] if spec.shape else 0 for spec in (codes, scales))
    if not columns or not groups:
        return ""
    bits, group = 32 * words // columns, columns // groups
    mode = _MODES.get((bits, group), "") if scales.dtype == "U8" else "affine"
    kind = format_of(mode, bits, group)
    return kind.name if kind else ""


def _form(role: Role, spec: TensorSpec, config: ModelConfig) -> str:
    if role.name in _NORMS:
        return MlxNorm.name
    colours = config.dims.get("vision_channels")
    return MlxPatches.name if role.name == _PATCHES and spec.shape[-1:] == (colours,) else ""


def _interval(config: ModelConfig) -> int:
    """Return the distance of layers with full attention, from which MLX derives all types.

    Raises:
        ConfigError: there is none.
    """
    full = [kind == "full_attention" for kind in config.layer_types]
    interval = full.index(True) + 1 if True in full else len(full) + 1
    if full != [(i + 1) % interval == 0 for i in range(len(full))]:
        found, expected = "layer_types follow no interval", "every n-th full_attention, as in MLX"
        raise ConfigError("config.json", found, expected=expected)
    return interval


def _nested(raw: Mapping[str, Any]) -> dict[str, Any]:
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


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Return the rotary embedding, all of it where MLX looks."""
    rope = rope_of(config.text_raw)
    parameters = {key: value for key, value in rope.parameters.items() if key != "type"}
    parameters.setdefault("mrope_section", [11, 11, 10])
    own = {"rope_type": rope.kind, "rope_theta": rope.theta}
    return {**parameters, **own, "partial_rotary_factor": rope.partial}
