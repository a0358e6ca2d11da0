"""The dialect of MLX: what mlx-lm and mlx-vlm load."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.dialect import Dialect, FamilyTensors, Program, StackedTensor
from qwen35.codecs.mlx.codec import MlxGateNorm, MlxNorm, MlxPatches
from qwen35.codecs.mlx.config import SECTIONS
from qwen35.codecs.mlx.layout import format_of
from qwen35.codecs.mlx.mlx_names import (
    EMBEDDING,
    HEAD,
    family_name,
    is_stack,
    split_experts,
    stacked_tensors,
    with_taps,
)
from qwen35.codecs.mlx.mlx_settings import misread, nested, set_settings, with_rope
from qwen35.codecs.plain.codec import Plain
from qwen35.errors import ConfigError, InputError, TensorError, UsageError
from qwen35.model.model_config import ARCHITECTURES, ModelConfig
from qwen35.model.roles import Role, role_of
from qwen35.model.text_only import TEXT_TYPES, text_only_config
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

_GATE_NORM = "linear_attn.norm"
_PATCHES = "visual.patch_embed.proj"
_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
"""Modes by bits and group, where scales are bytes."""


class MlxFiles(Dialect):
    """MLX's safetensors files and config.json."""

    name = "mlx"
    files = "model*.safetensors"
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

    def reads(self, tensors: Mapping[str, StoredTensor], formats: Set[str]) -> bool:
        """Return whether the embedding has its name in MLX, and something else tells of it."""
        if EMBEDDING not in tensors:
            return False
        if self.name in formats or any(name.endswith(".scales") for name in tensors):
            return True
        taps = (stored.spec for stored in tensors.values() if with_taps(stored.spec) is not None)
        return all(spec.shape[-1] == 1 for spec in taps)

    def family_config(self, raw: object) -> object:
        """Return config.json without MLX's section; flat where there is no tower."""
        if not isinstance(raw, dict):
            return raw
        own = copy.deepcopy(raw)
        sections = {key: own.pop(key, None) for key in SECTIONS}
        text = own.get("text_config")
        if not isinstance(text, dict) or own.get("model_type") not in [*TEXT_TYPES]:
            return raw
        if "tie_word_embeddings" in own:  # where MLX does not look
            text.setdefault("tie_word_embeddings", False)
        tied = text.get("tie_word_embeddings")
        if tied is not None:
            own["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
        with_rope(text)
        if not own.get("vision_config"):
            own = text_only_config(own, text, own["model_type"], tied=tied is True)
            own |= {} if tied is None else {"tie_word_embeddings": tied}  # of whatever type
        own["quantization_config"] = {"quant_method": self.name, **sections}
        return own

    def family_tensors(
        self, tensors: Mapping[str, StoredTensor], config: ModelConfig
    ) -> FamilyTensors:
        """Return the tensors under the family's names, experts one by one."""
        found = misread(config.raw, config.text_raw, config)
        problems: list[InputError] = [ConfigError("config.json", one) for one in found]
        problems += _unscaled(tensors)
        left = {name for name in tensors if "mtp." in name}
        notes = [_dropped(len(left))] if left else []
        if config.tied and HEAD in tensors:
            problems.append(_needless_head())
            left.update(name for name in tensors if name.startswith(HEAD.removesuffix("weight")))
        left.update(f"{problem.subject.removesuffix('scales')}biases" for problem in problems)
        named: dict[str, StoredTensor] = {}
        for name, stored in tensors.items():
            if name not in left:
                problems += _add(named, name, stored, config)
        held = dict(_held(named, config))
        for weight in [name for name, kind in held.items() if not kind]:
            problems.append(_no_format(named, weight))
            held.pop(weight)
        return FamilyTensors(named, held, problems, notes)

    # --- writing

    def unpacked(self, role: Role) -> str:
        """Return the codec of norms, of the patch embedding, and of all others."""
        if role.name in _NORMS:
            return MlxNorm.name
        return MlxPatches.name if role.name == _PATCHES else Plain.name

    def stacks(self, specs: Iterable[TensorSpec]) -> list[StackedTensor]:
        """Return the tensors of a file that holds these."""
        return stacked_tensors(specs)

    def config(
        self, raw: dict[str, Any], config: ModelConfig, modules: Sequence[LoaderModule]
    ) -> dict[str, Any]:
        """Return config.json with MLX's sections, nested also for a text model alone.

        MTP has to be dropped, which MLX does not load.
        """
        kept = next((module for module in modules if module.role.scope == "mtp"), None)
        if kept is not None:
            found = f"keeps {kept.spec.name}, which MLX does not load"
            hint = 'put a rule with match = "mtp" and action = "drop" before it'
            raise UsageError("recipe", found, hint=hint)
        section = raw.pop("quantization_config", None)
        for key in SECTIONS:
            raw.pop(key, None)
        if not ARCHITECTURES[raw["model_type"]].vision:
            raw = nested(raw)
        text = raw["text_config"]
        own_head = any(module.role.name == "lm_head" for module in modules)
        tied = config.tied and not own_head  # MLX has no place for the head of a tied model
        text["tie_word_embeddings"] = raw["tie_word_embeddings"] = tied
        set_settings(text, config)
        for found in misread(raw, text, config):
            raise ConfigError("config.json", found)
        if section is not None:
            raw["quantization"] = raw["quantization_config"] = section
        return raw


def _scales(weight: str) -> str:
    return f"{weight.removesuffix('weight')}scales"


def _unscaled(tensors: Mapping[str, StoredTensor]) -> Iterator[TensorError]:
    """Yield the scales that packed weights lack."""
    for name, stored in tensors.items():
        packed = name.endswith(".weight") and stored.spec.dtype == "U32"
        if packed and _scales(name) not in tensors:
            hint = "the checkpoint was saved incompletely: start from the original"
            yield TensorError(_scales(name), f"missing, though {name} is packed", hint=hint)


def _no_format(named: dict[str, StoredTensor], weight: str) -> TensorError:
    """Return why nothing decodes a weight; its scales and biases are left out."""
    scales = named.pop(_scales(weight)).spec
    named.pop(f"{weight.removesuffix('weight')}biases", None)
    codes = named[weight].spec
    found = f"{codes.dtype} {list(codes.shape)} with scales {scales.dtype} {list(scales.shape)}"
    return TensorError(weight, found, expected="a format of MLX that is read here (docs/mlx.md)")


def _needless_head() -> TensorError:
    found = "stored, though tie_word_embeddings is true"
    hint = "MLX has no place for it: set that to false, or leave the head out"
    return TensorError(HEAD, found, hint=hint)


def _add(
    named: dict[str, StoredTensor], name: str, stored: StoredTensor, config: ModelConfig
) -> Iterator[TensorError]:
    """Add a tensor under its name in the family; yield what is wrong with it."""
    family = family_name(name, vision=config.architecture.vision)
    spec = TensorSpec(family, stored.spec.dtype, stored.spec.shape)
    taps = with_taps(spec)
    if taps is not None and spec.shape[-1] != 1:
        yield _untouched(name, spec, taps)
        taps = None
    whole = replace(stored, spec=taps or spec)
    experts = config.dims.get("experts", 0)
    parts = split_experts(whole, experts)
    if not parts and is_stack(family):
        found, expected = f"a stack of shape {list(spec.shape)}", f"{experts} experts"
        yield TensorError(name, found, expected=f"{expected} by config.json")
        return
    for part in parts or [whole]:
        if part.spec.name in named:
            yield TensorError(name, f"two tensors for {part.spec.name}")
        named[part.spec.name] = part


def _untouched(name: str, spec: TensorSpec, taps: TensorSpec) -> TensorError:
    hint = "with one such convolution MLX adds 1 to all norms again: convert from the original"
    return TensorError(name, f"shape {list(spec.shape)}", expected=f"{list(taps.shape)}", hint=hint)


def _dropped(count: int) -> str:
    return (
        f"{count} tensors of multi-token prediction are left out, as by MLX's loaders: tools "
        "differ in what they store there"
    )


def _held(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the weights that other codecs hold than their dtypes tell, with their codecs.

    A codec is empty where scales and codes are those of none.
    """
    kinds: dict[object, str] = {}
    for name, stored in tensors.items():
        if not name.endswith(".weight"):
            continue
        try:
            role = role_of(name)
        except TensorError:  # named when weights are matched with config.json
            continue
        scales = tensors.get(_scales(name))
        if scales is not None:
            columns = config.dims.get(role.info.shape[-1], 0)
            spec = stored.spec
            key = (columns, spec.dtype, spec.shape, scales.spec.dtype, scales.spec.shape)
            yield name, kinds.setdefault(key, _format(columns, stored.spec, scales.spec))
        elif form := _form(role, stored.spec, config):
            yield name, form


def _format(columns: int, codes: TensorSpec, scales: TensorSpec) -> str:
    """Return the codec of codes and scales of `columns` values; empty if there is none."""
    words, groups = (spec.shape[-1] if spec.shape else 0 for spec in (codes, scales))
    if not columns or not groups or codes.dtype != "U32" or len(codes.shape) != len(scales.shape):
        return ""
    bits, group = 32 * words // columns, columns // groups
    mode = _MODES.get((bits, group), "") if scales.dtype == "U8" else "affine"
    kind = format_of(mode, bits, group)
    return kind.name if kind else ""


def _form(role: Role, spec: TensorSpec, config: ModelConfig) -> str:
    if role.name in _NORMS:
        return MlxNorm.name
    if role.name == _GATE_NORM and spec.dtype in ("BF16", "F16"):
        return MlxGateNorm.name
    colours = config.dims.get("vision_channels")
    return MlxPatches.name if role.name == _PATCHES and spec.shape[-1:] == (colours,) else ""
