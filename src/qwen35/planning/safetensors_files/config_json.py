"""The config.json of an output, derived from what the plan writes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError
from qwen35.model.model_config import ARCHITECTURES, ModelConfig
from qwen35.model.named_code import without_code
from qwen35.model.text_only import text_only_config

if TYPE_CHECKING:
    from qwen35.codecs.dialect import Dialect
    from qwen35.planning.safetensors_files.safetensors_steps import DraftStep

__all__ = ["output_config"]


def output_config(
    config: ModelConfig,
    drafts: Sequence[DraftStep],
    *,
    text_only: bool,
    prefix: str,
    cached: bool = False,
    dialect: Dialect | None = None,
) -> dict[str, Any]:
    """Return config.json for the tensors that `drafts` write.

    Args:
        config: the source's config.
        drafts: all steps of the output.
        text_only: whether the vision tower of a vision-language source is dropped.
        prefix: prefix of text tensors in the output.
        cached: whether the output has scales of a KV cache.
        dialect: of its files, if it is not the family's own.

    Raises:
        UsageError: no loader could read the tensors.
    """
    raw = without_code(_text_only(config) if text_only else copy.deepcopy(config.raw))
    text = raw["text_config"] if ARCHITECTURES[raw["model_type"]].vision else raw
    for section in (raw, text):  # it describes the source's packing
        section.pop("quantization_config", None)
    layers = config.mtp_layers if _writes_mtp(drafts) else 0
    if layers or config.promised_mtp:
        _set_mtp(raw, text, layers)
    written = [draft for draft in drafts if draft.outputs]
    packings = [
        CODECS[name] for name in sorted({draft.codec for draft in written}) if CODECS[name].packed
    ]
    if len({codec.method for codec in packings}) > 1:
        labels = " and ".join(sorted((codec.label for codec in packings), reverse=True))
        found = f"would leave {labels} weights in one checkpoint"
        raise UsageError("recipe", found, hint="decode the source first, with --recipe bf16")
    for codec in packings[:1]:  # those of one method describe each other
        raw["quantization_config"] = codec.config(written, prefix, config.dtype)
        if cached and codec.cache_form is not None:
            raw["quantization_config"]["kv_cache_scheme"] = dict(codec.cache_form.scheme)
    if dialect is None:
        return raw
    return dialect.config(raw, config, written)


def _set_mtp(raw: dict[str, Any], text: dict[str, Any], layers: int) -> None:
    """Set the number of MTP layers in every section that has it."""
    key = "mtp_num_hidden_layers"
    text[key] = layers
    if key in raw:
        raw[key] = layers


def _writes_mtp(drafts: Sequence[DraftStep]) -> bool:
    written = {bool(draft.outputs) for draft in drafts if draft.role.scope == "mtp"}
    if len(written) > 1:
        raise UsageError("recipe", "drops a part of the MTP layer", hint="drop mtp, or keep it")
    return written == {True}


def _text_only(config: ModelConfig) -> dict[str, Any]:
    return text_only_config(config.raw, config.text_raw, config.model_type, tied=config.tied)
